"""``batchnorm doctor``: a broken checkpoint is status 1 and says why, a healthy one is 0, everything else is 2."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from doctoring import LOADER, MODEL, doctor, install, lines, seen

from batchnorm.cli import doctor as command
from batchnorm.doctor import examine as examining
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.rule import Needs, Subject
from commands import BATCHNORM, run_command
from examinations import HOSTILE
from small_network import make, save, trained

pytestmark = pytest.mark.usefixtures("own_folder")


def codes(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """Of the findings in the output as JSON."""
    return [(found["code"], found["layer"]) for found in json.loads(capsys.readouterr().out)["findings"]]


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line, on standard error."""
    out, [error] = lines(capsys)
    assert out == []
    return error


def test_parameters_without_statistics_are_found(lost: str, capsys: pytest.CaptureFixture[str]):
    assert doctor(lost) == 1
    out, err = lines(capsys)
    assert out[0] == "lost.pt: 2 BN layers, 2 errors"
    assert "error BN100 missing-statistics: bn1, bn2" in out
    assert any("recalibrate" in text for text in out)
    assert err == []


def test_parameters_without_statistics_are_found_in_safetensors(capsys: pytest.CaptureFixture[str]):
    tensors = {name: value.detach() for name, value in trained().named_parameters()}
    safetensors.torch.save_file(tensors, "lost.safetensors")
    assert doctor("lost.safetensors", "--output-format", "json") == 1
    assert codes(capsys) == [("BN100", "bn1"), ("BN100", "bn2")]


def test_statistics_that_a_lenient_load_left_at_their_start_are_found(lost: str, capsys: pytest.CaptureFixture[str]):
    network = make()
    network.load_state_dict(torch.load(lost), strict=False)
    network.bn1.bias.data.normal_()
    network.bn2.bias.data.normal_()
    assert doctor(save(Path("again.pt"), network.state_dict()), "--fail-on", "warning", "--select", "BN101") == 1
    assert "BN101" in lines(capsys)[0][2]


@pytest.mark.parametrize("fail_on", ["error", "warning"])
def test_a_healthy_file_is_status_0(healthy: str, fail_on: str, capsys: pytest.CaptureFixture[str]):
    assert doctor(healthy, "--fail-on", fail_on) == 0
    out, err = lines(capsys)
    assert out[0] == "net.pt: 2 BN layers, nothing found"
    assert err == []


def test_a_healthy_safetensors_file_is_examined_without_torch():
    safetensors.torch.save_file(trained().state_dict(), "net.safetensors")
    script = (
        "import sys; from batchnorm.cli.main import run; status = run(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = run_command([sys.executable, "-c", script, "doctor", "net.safetensors"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("net.safetensors: 2 BN layers, nothing found\n")


def test_the_threshold_decides_the_status():
    state = {name: value.half() if "running" in name else value for name, value in trained().state_dict().items()}
    path = save(Path("half.pt"), state)
    assert doctor(path) == 0
    assert doctor(path, "--fail-on", "warning") == 1
    assert doctor(path, "--fail-on", "warning", "--ignore", "BN107") == 0


@pytest.mark.parametrize("output_format", command.FORMATS)
def test_every_format_is_on_standard_output_or_in_a_file(
    lost: str, output_format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(examining, "RULES", [rule for rule in examining.RULES if rule.needs <= {Needs.FILE}])
    assert doctor(lost, "--output-format", output_format) == 1
    captured = capsys.readouterr()
    assert "BN100" in captured.out
    summary = [] if output_format == "text" else ["lost.pt: 2 BN layers, 2 errors"]
    assert captured.err.splitlines() == summary
    assert doctor(lost, "--output-format", output_format, "--output", "found") == 1
    assert lines(capsys) == ([], ["wrote found", "lost.pt: 2 BN layers, 2 errors"])
    assert Path("found").read_text() == captured.out
    assert doctor(lost, "--output-format", output_format, "--output", "found") == 1


def test_concise_names_the_rules_that_did_not_run_on_standard_error(
    healthy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    install(monkeypatch, seen, Needs.MODEL)
    assert doctor(healthy, "--output-format", "concise") == 0
    assert lines(capsys) == ([], ["net.pt: 2 BN layers, nothing found", "not run: BN999 needs --model"])


def test_color_is_for_terminals(lost: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    assert doctor(lost) == 1
    colored = capsys.readouterr().out
    assert "\x1b[1;31merror" in colored
    monkeypatch.setenv("NO_COLOR", "1")
    assert doctor(lost) == 1
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 60
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert doctor(lost) == 1
    assert capsys.readouterr().out == plain


def test_characters_that_the_output_cannot_encode_are_escapes():
    state = {f"sch\N{LATIN SMALL LETTER O WITH DIAERESIS}n.{name}": x for name, x in trained().bn1.state_dict().items()}
    next(x for name, x in state.items() if name.endswith("var"))[0] = torch.nan
    save(Path("net.pt"), state)
    command = [*BATCHNORM, "doctor", "net.pt", "--output-format", "concise"]
    done = run_command(command, environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert done.stdout.startswith("net.pt: sch\\xf6n: BN102 error ")


def test_selected_rules_alone_run(lost: str, capsys: pytest.CaptureFixture[str]):
    for options, status in (
        (["--select", "BN0"], 0),
        (["--select", "bn100"], 1),
        (["--select", "BN0,BN100"], 1),
        (["--select", "BN0", "--select", "BN1", "--ignore", "BN100"], 0),
    ):
        assert doctor(lost, *options) == status
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--select", "BN7"], "batchnorm: --select: no rule's code begins with 'BN7'; codes are BN001 to "),
        (["--ignore", ","], "batchnorm: --ignore: no rule's code begins with ''"),
        (["--fail-on", "never"], "batchnorm doctor: Invalid value for '--fail-on'"),
        (["--output-format", "xml"], "batchnorm doctor: Invalid value for '--output-format'"),
        (LOADER, "batchnorm doctor: --data is for a model: name the function that builds it with --model."),
        (["--batch-size", 3], "batchnorm doctor: --batch-size is for a file of --data"),
        ([*MODEL, *LOADER, "--batch-size", 3], "batchnorm doctor: --batch-size is for a file of --data"),
        (["--baseline", "a", "--write-baseline", "a"], "batchnorm doctor: --baseline and --write-baseline are two"),
        (["--baseline", "nowhere.json"], "batchnorm: [Errno 2] No such file or directory: 'nowhere.json'"),
        (["--baseline", "net.pt"], "batchnorm: net.pt is no baseline: expected a file of batchnorm doctor"),
        (["--write-baseline", "net.pt"], "batchnorm: net.pt is no baseline: expected a file of batchnorm doctor"),
        (["--write-baseline", "no/b.json"], "batchnorm: [Errno 2] No such file or directory: "),
        (["--output", "net.pt"], "batchnorm: net.pt is the checkpoint itself, which stays as it is"),
        (["--output", "no/found.txt"], "batchnorm: there is no folder no for found.txt"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(
    healthy: str, arguments: list[Any], message: str, capsys: pytest.CaptureFixture[str]
):
    before = Path(healthy).read_bytes()
    assert doctor(healthy, *arguments) == 2
    assert line(capsys).startswith(message)
    assert Path(healthy).read_bytes() == before


@pytest.mark.parametrize("target", ["nowhere.pt", "empty.pt", "text.pt", ".", "no_such_module:make"])
def test_an_unreadable_target_is_one_line_and_status_2(target: str, capsys: pytest.CaptureFixture[str]):
    Path("empty.pt").touch()
    Path("text.pt").write_text("not a checkpoint")
    assert doctor(target) == 2
    *announced, last = lines(capsys)[1]
    assert announced in ([], ["running the code of no_such_module"])
    assert last.startswith("batchnorm: ")


def test_a_crash_of_a_rule_is_never_status_1(
    lost: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def check(subject: Subject) -> list[Finding]:
        raise ZeroDivisionError("inside")

    install(monkeypatch, check, Needs.FILE)
    assert doctor(lost) == 2
    assert "this is a fault of batchnorm" in lines(capsys)[1][-1]


def test_nothing_of_a_file_is_run(capsys: pytest.CaptureFixture[str]):
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (Path("owned"),))

    save(Path("attack.pt"), {"weight": torch.ones(3), "attack": Attack()})
    assert doctor("attack.pt", "--fail-on", "warning") == 1
    assert "BN001" in capsys.readouterr().out
    assert not Path("owned").exists()


@pytest.mark.parametrize("output_format", command.FORMATS)
def test_hostile_names_in_a_file_come_out_escaped(output_format: str, capsys: pytest.CaptureFixture[str]):
    network = trained()
    state = {
        f"{name.replace('.', '_')}{i}.{role}": value
        for i, name in enumerate(HOSTILE)
        for role, value in network.bn1.state_dict().items()
        if role != "running_var"
    }
    save(Path("hostile.pt"), state)
    assert doctor("hostile.pt", "--output-format", output_format) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert not set(captured.out + captured.err) & set("\x1b\0\x07\r\u202e\u2066\u2028")
