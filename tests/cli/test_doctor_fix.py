"""``batchnorm doctor --fix``: what it writes, what it prints, how it ends."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.cli import main
from small_network import save, trained, without_statistics

MODEL = ["--model", "small_network:make", "--data", "small_network:loader"]
UNSAFE = ["--fix", "--unsafe-fixes", "--select", "BN1"]


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    return save(tmp_path / "net.pt", {"epoch": 3, "state_dict": without_statistics(trained().state_dict())})


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    state = trained().state_dict()
    return save(tmp_path / "half.pt", {n: value.half() if "running" in n else value for n, value in state.items()})


def doctor(*arguments: object) -> int:
    return main.run(["doctor", *map(str, arguments)])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize("out", ["net.fixed.safetensors", "again.pt"])
def test_a_repaired_file_is_examined_without_findings(lost: Path, out: str, capsys: pytest.CaptureFixture[str]):
    before = lost.read_bytes()
    named = [] if out.endswith("tensors") else ["--out", lost.parent / out]
    assert doctor(lost, "--select", "BN1") == 1
    assert doctor(lost, *UNSAFE, *MODEL, *named) == 0
    captured = capsys.readouterr()
    assert "fixed BN100 missing-statistics: state_dict.bn1: measured on" in captured.out
    assert f"wrote {lost.parent / out}" in captured.err
    assert doctor(lost.parent / out, "--select", "BN1") == 0
    assert sorted(os.listdir(lost.parent)) == sorted(["net.pt", out])
    assert lost.read_bytes() == before


def test_what_is_left_decides_the_status(lost: Path, capsys: pytest.CaptureFixture[str]):
    assert doctor(lost, "--fix") == 1
    captured = capsys.readouterr()
    assert "refused BN100" in captured.out
    assert "--unsafe-fixes" in captured.out
    assert "nothing is repaired, so nothing is written" in captured.err
    assert os.listdir(lost.parent) == ["net.pt"]


def test_safe_repairs_need_no_leave_and_no_model(narrow: Path, capsys: pytest.CaptureFixture[str]):
    assert doctor(narrow, "--fix", "--fail-on", "info") == 0
    assert "fixed BN107 narrow-statistics: bn1, bn2: stored as float32; no value changes (safe)" in (
        capsys.readouterr().out
    )


def test_a_difference_shows_the_largest_change_and_writes_nothing(lost: Path, capsys: pytest.CaptureFixture[str]):
    document = torch.load(lost)
    document["state_dict"] |= {"bn1.running_mean": torch.zeros(4), "bn1.running_var": torch.full((4,), torch.nan)}
    torch.save(document, lost)
    before = lost.read_bytes()
    assert doctor(lost, "--diff", "--unsafe-fixes", "--select", "BN1", *MODEL) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("state_dict.bn1")]
    found = {row[0].rpartition(".")[2]: row[2] for row in rows}
    assert float(found["running_mean"]) > 0
    assert found["running_var"] == "not"
    assert os.listdir(lost.parent) == ["net.pt"]
    assert lost.read_bytes() == before


def test_json_has_the_digests_of_all_tensors(lost: Path, capsys: pytest.CaptureFixture[str]):
    assert doctor(lost, *UNSAFE, *MODEL, "--out", lost.parent / "new.pt", "--output-format", "json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["findings"] == []
    done = record["repair"]
    assert [each["action"] for each in done["outcomes"]] == ["fixed", "fixed"]
    digests = {each["name"]: each["sha256"] for each in done["unchanged"]}
    digests |= {each["name"]: each["sha256"][1] for each in done["changed"]}
    written = torch.load(lost.parent / "new.pt")["state_dict"]
    for name, value in written.items():
        assert digests[f"state_dict.{name}"] == hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
    assert len(digests) == len(written)


@pytest.mark.parametrize("output_format", ["text", "concise", "json", "markdown", "github", "sarif", "html"])
def test_every_format_takes_hostile_names(output_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = "evil\x1b[2J\n::error::<script>|`"
    state = {f"{path}.{name}": value.half() for name, value in trained().bn1.state_dict().items()}
    file = save(tmp_path / "net.pt", {**state, f"{path}.num_batches_tracked": torch.tensor(3)})
    assert doctor(file, "--fix", "--select", "BN107", "--output-format", output_format) == 0
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "\x1b" not in text
        assert not any(line.startswith("::error::<") for line in text.splitlines())
    assert "<script>|" not in (captured.out if output_format in ("html", "markdown") else "")


def test_an_earlier_file_is_overwritten_by_force_alone(lost: Path, capsys: pytest.CaptureFixture[str]):
    out = lost.parent / "net.fixed.safetensors"
    out.write_bytes(b"an earlier one")
    assert doctor(lost, *UNSAFE, *MODEL) == 2
    assert "net.fixed.safetensors exists already" in last_line(capsys)
    assert out.read_bytes() == b"an earlier one"
    assert doctor(lost, *UNSAFE, *MODEL, "--force") == 0
    assert doctor(out) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "new.pt"], "--out is for --fix or --diff."),
        (["--unsafe-fixes"], "--unsafe-fixes is for --fix or --diff."),
        (["--diff", "--out", "new.pt"], "--diff writes nothing: leave out --out and --force."),
        (["--fix", "--out", "nowhere/new.pt"], "there is no folder nowhere"),
        (["--fix", "--data", "small_network:loader"], "name the function that builds it with --model"),
        (["--fix", "--unsafe-fixes", "--statistics", "small_network:SAMPLES"], "is of type int: expected a function"),
        (["--fix", "--unsafe-fixes", "--statistics", "small_network:inputs"], "returned a Tensor, expected"),
        (["--fix", "--unsafe-fixes", "--statistics", "small_network:nothing"], "has no 'nothing'"),
        (["--fix", "--model", "small_network:Twice"], "none of the model's tensors"),
    ],
)
def test_what_cannot_be_is_one_line(
    lost: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    monkeypatch.chdir(lost.parent)
    assert doctor(lost, *arguments) == 2
    assert message in last_line(capsys)
    assert os.listdir(lost.parent) == ["net.pt"]


def test_code_is_no_checkpoint_to_fix(capsys: pytest.CaptureFixture[str]):
    assert doctor("small_network:make", "--fix") == 2
    assert "--fix writes a checkpoint, so TARGET must be one" in last_line(capsys)


def test_an_error_in_the_data_is_one_line_and_writes_nothing(lost: Path, capsys: pytest.CaptureFixture[str]):
    program = lost.parent / "data.py"
    program.write_text("import small_network\n\n\ndef loader():\n    yield from small_network.loader()\n    1 / 0\n")
    arguments = ["--model", "small_network:make", "--data", f"{program}:loader"]
    assert doctor(lost, *UNSAFE, *arguments) == 2
    line = last_line(capsys)
    assert "ZeroDivisionError: division by zero" in line
    assert "data.py:6" in line
    assert sorted(set(os.listdir(lost.parent)) - {"__pycache__"}) == ["data.py", "net.pt"]


def test_layers_that_the_settings_ignore_are_not_repaired(narrow: Path, monkeypatch: Any):
    monkeypatch.chdir(narrow.parent)
    Path("pyproject.toml").write_text('[tool.batchnorm.doctor.per-layer-ignores]\nbn1 = ["BN107"]\n')
    assert doctor(narrow, "--fix", "--out", "new.pt") == 0
    state = torch.load("new.pt")
    assert (state["bn1.running_mean"].dtype, state["bn2.running_mean"].dtype) == (torch.float16, torch.float32)


def test_statistics_of_a_function_of_the_user(lost: Path):
    program = lost.parent / "measure.py"
    program.write_text(
        "def statistics():\n"
        "    return {f'state_dict.{name}': ([1.0] * n, [4.0] * n) for name, n in (('bn1', 4), ('bn2', 5))}\n"
    )
    assert doctor(lost, *UNSAFE, "--statistics", f"{program}:statistics", "--out", lost.parent / "new.pt") == 0
    assert torch.load(lost.parent / "new.pt")["state_dict"]["bn2.running_var"].tolist() == [4.0] * 5
