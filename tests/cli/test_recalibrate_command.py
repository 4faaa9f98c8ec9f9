"""``batchnorm recalibrate``: a checkpoint that lost its statistics gets those of the data, and keeps all else."""

import errno
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from batchnorm.cli import main, progress
from commands import BATCHNORM
from small_network import SAMPLES, STATISTICS, Twice, inputs, make, population, save, trained, without_statistics

TESTS = Path(__file__).parents[1]
MODEL = ["--model", "small_network:make"]
LOADER = ["--data", "small_network:loader"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A file with the inputs."""
    path = tmp_path / "inputs.npy"
    np.save(path, inputs().numpy())
    return str(path)


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """A checkpoint whose statistics were lost."""
    return save(tmp_path / "net.pt", without_statistics(trained().state_dict()))


def recalibrate(*arguments: object) -> int:
    return main.run(["recalibrate", *map(str, arguments)])


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error; the ones before it announce the user's code and what is missing."""
    captured = capsys.readouterr()
    assert captured.out == ""
    *before, last = captured.err.splitlines()
    assert all(text.startswith(("running the code of", "running statistics")) for text in before), captured.err
    return last


def test_lost_statistics_are_measured_and_the_checkpoint_loads_again(lost: Path, data: str, tmp_path: Path):
    before = lost.read_bytes()
    assert recalibrate(lost, *MODEL, "--data", data) == 0
    found = read(tmp_path / "net.recalibrated.pt")
    for name, expected in population(trained(), inputs()).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    make().load_state_dict(found)
    assert all(torch.equal(found[name], value) for name, value in read(lost).items())
    assert lost.read_bytes() == before


def test_the_restored_network_evaluates_as_the_trained_one_on_the_same_data(lost: Path, data: str, tmp_path: Path):
    network = trained()
    for layer in (network.bn1, network.bn2):
        layer.momentum = 1.0
    network.train()(inputs())
    assert recalibrate(lost, *MODEL, "--data", data) == 0
    repaired = make()
    repaired.load_state_dict(read(tmp_path / "net.recalibrated.pt"))
    torch.testing.assert_close(repaired.eval()(inputs()), network.eval()(inputs()), rtol=1e-4, atol=1e-5)


def test_a_trainers_checkpoint_keeps_everything_else(tmp_path: Path, data: str):
    network = trained()
    state = nn.DataParallel(network).state_dict()
    state["module.bn1.running_var"] = -torch.ones(4)
    document = {
        "epoch": 7,
        "state_dict": state,
        "ema": dict(trained().state_dict()),
        "optimizer": torch.optim.Adam(network.parameters()).state_dict(),
    }
    path = save(tmp_path / "epoch7.ckpt", document)
    assert recalibrate(path, *MODEL, "--data", data) == 0
    found = read(tmp_path / "epoch7.recalibrated.ckpt")
    assert list(found) == list(document)
    assert list(found["state_dict"]) == list(state)
    assert found["state_dict"]._metadata == state._metadata
    assert (found["epoch"], found["optimizer"]) == (7, document["optimizer"])
    assert all(torch.equal(found["ema"][name], value) for name, value in document["ema"].items())
    changed = [name for name, value in found["state_dict"].items() if not torch.equal(value, state[name])]
    assert changed == [name for name in state if name.endswith(STATISTICS)]


def test_a_safetensors_file_stays_one_with_its_metadata(tmp_path: Path, data: str):
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(without_statistics(trained().state_dict()), path, {"license": "mine"})
    assert recalibrate(path, *MODEL, "--data", data) == 0
    with safetensors.safe_open(tmp_path / "net.recalibrated.safetensors", "pt") as file:
        assert file.metadata() == {"license": "mine"}
        make().load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def test_statistics_are_written_in_the_precision_of_the_model(tmp_path: Path, data: str):
    state = trained().half().state_dict()
    assert recalibrate(save(tmp_path / "net.pt", state), *MODEL, "--data", data) == 0
    found = read(tmp_path / "net.recalibrated.pt")
    assert {value.dtype for name, value in found.items() if name.endswith(("mean", "var"))} == {torch.float32}
    assert {value.dtype for name, value in found.items() if name.endswith(("weight", "bias"))} == {torch.float16}


def test_the_table_says_what_changed_layer_by_layer(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    network = trained()
    state = network.state_dict()
    expected = population(trained(), inputs())
    sd = (expected["bn1.running_var"] + network.bn1.eps).sqrt()
    state["bn1.running_mean"] = (expected["bn1.running_mean"] + sd * torch.tensor([0.1, -0.5, 0, 0])).float()
    state["bn1.running_var"] = (expected["bn1.running_var"] / torch.tensor([1, 2, 1, 0.5])).float()
    state["bn2.running_mean"][0] = torch.nan
    assert recalibrate(save(tmp_path / "net.pt", state), *MODEL, "--data", data) == 0
    captured = capsys.readouterr()
    heading, first, second = captured.out.splitlines()
    assert heading.split("  ")[0] == "layer"
    assert first.startswith("bn1")
    assert f"{SAMPLES * 36:,}" in first
    assert "0.5 sd" in first
    assert first.endswith("0.5 to 2")
    assert second.startswith("bn2")
    assert second.endswith("inf or NaN")
    assert captured.err.splitlines() == [
        "running the code of small_network",
        "running statistics inf or NaN: 'bn2'",
        f"wrote {tmp_path / 'net.recalibrated.pt'}",
    ]


def test_a_loader_in_the_users_code_feeds_the_model(lost: Path, tmp_path: Path):
    assert recalibrate(lost, *MODEL, *LOADER, "--out", tmp_path / "new.pt") == 0
    found = read(tmp_path / "new.pt")
    expected = population(trained(), inputs())
    torch.testing.assert_close(found["bn1.running_var"].double(), expected["bn1.running_var"], rtol=1e-5, atol=1e-6)
    assert found["bn1.num_batches_tracked"] == 3


def test_estimators_batches_and_layer_by_layer_are_those_of_the_function(lost: Path, data: str, tmp_path: Path):
    found = {}
    options = {"pooled": [], "paper": ["--estimator", "paper"], "layers": ["--layer-by-layer"]}
    for name, chosen in options.items():
        assert recalibrate(lost, *MODEL, "--data", data, "--batch-size", 8, *chosen, "--out", tmp_path / name) == 0
        found[name] = read(tmp_path / name)
    x = nn.functional.conv2d(inputs().double(), trained().conv1.weight.double())
    paper = torch.stack([part.var((0, 2, 3), correction=1) for part in x.split(8)]).mean(0)
    pooled = x.var((0, 2, 3), correction=1)
    for name, expected in (("pooled", pooled), ("paper", paper), ("layers", pooled)):
        torch.testing.assert_close(found[name]["bn1.running_var"].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["layers"]["bn2.running_var"], found["pooled"]["bn2.running_var"])


def test_few_samples_are_enough_where_few_are_asked_for(lost: Path, data: str, tmp_path: Path):
    out = tmp_path / "few.pt"
    assert recalibrate(lost, *MODEL, "--data", data, "--batch-size", 8, "--max-samples", 9, "--out", out) == 0
    assert read(out)["bn1.num_batches_tracked"] == 2
    assert (
        recalibrate(lost, *MODEL, "--data", data, "--batch-size", 4, "--tolerance", 9.0, "--out", out, "--force") == 0
    )
    assert read(out)["bn1.num_batches_tracked"] == 2


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["--batch-size", 8], ["measuring 1/3", "measuring 2/3", "measuring 3/3"]),
        (["--batch-size", 12, "--layer-by-layer"], [f"measuring {i}/4" for i in range(1, 5)]),
        (["--batch-size", 8, "--max-samples", 20], ["measuring 8/20", "measuring 16/20", "measuring 20/20"]),
    ],
)
def test_progress_is_told_in_batches_or_in_the_samples_that_were_asked_for(
    options: list[Any],
    lines: list[str],
    lost: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert recalibrate(lost, *MODEL, "--data", data, *options) == 0
    told = [text.partition(",")[0] for text in capsys.readouterr().err.splitlines() if text.startswith("measuring")]
    assert told == lines


def test_only_chosen_layers_change(tmp_path: Path, data: str):
    state = trained().state_dict()
    path = save(tmp_path / "net.pt", state)
    assert recalibrate(path, *MODEL, "--data", data, "--layers", "*2", "--layers", "nothing*") == 2
    assert recalibrate(path, *MODEL, "--data", data, "--layers", "*2") == 0
    found = read(tmp_path / "net.recalibrated.pt")
    changed = [name for name, value in found.items() if not torch.equal(value, state[name])]
    assert changed == [f"bn2.{name}" for name in STATISTICS]


def test_a_layer_that_others_need_is_not_left_out(lost: Path, data: str, capsys: pytest.CaptureFixture[str]):
    assert recalibrate(lost, *MODEL, "--data", data, "--layers", "bn2") == 2
    assert "--layers leaves out 'bn1', and what comes behind needs their statistics." in line(capsys)
    assert len(list(lost.parent.iterdir())) == 2


def test_a_layer_with_two_names_is_written_under_both_and_an_idle_one_is_reported(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
):
    path = save(tmp_path / "net.pt", without_statistics(Twice().state_dict()))
    assert recalibrate(path, "--model", "small_network:Twice", "--data", data) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].split() == ["idle", "not", "reached"]
    assert captured.err.splitlines()[-1] == "still without usable statistics: 'idle'"
    found = read(tmp_path / "net.recalibrated.pt")
    assert torch.equal(found["first.running_mean"], found["again.running_mean"])
    assert {name for name in Twice().state_dict() if name not in found} == {f"idle.{name}" for name in STATISTICS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("fc.weight"),
            r'does not fit the model: .*Missing key\(s\) in state_dict: "fc.weight"',
        ),
        (lambda state: state.update(head=torch.ones(1)), r'does not fit .*Unexpected key\(s\) in state_dict: "head"'),
        (lambda state: state.update({"fc.bias": torch.ones(3)}), r"does not fit .*size mismatch for fc.bias"),
        (lambda state: state.pop("bn1.weight"), r'does not fit .*Missing key\(s\) in state_dict: "bn1.weight"'),
    ],
)
def test_weights_must_fit(change: Any, message: str, tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    state = trained().state_dict()
    change(state)
    assert recalibrate(save(tmp_path / "net.pt", state), *MODEL, "--data", data) == 2
    text = line(capsys)
    assert text.startswith(f"batchnorm: {tmp_path / 'net.pt'} does not fit the model: ")
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            inputs().double(),
            r"small_network:make on an input of size \(24, 3, 8, 8\) and type float64: RuntimeError: .*",
        ),
        (
            inputs()[:, :2],
            r"on an input of size \(24, 2, 8, 8\) and type float32: RuntimeError: .*channels.*small_network.py:\d+",
        ),
        (inputs() * torch.inf, r"layer 'bn1' received inf or NaN, so the running statistics stay as they were$"),
        (inputs()[:0], r"the loader yielded nothing"),
    ],
)
def test_data_that_the_model_does_not_take_is_one_line(
    values: torch.Tensor, message: str, lost: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    np.save(tmp_path / "bad.npy", values.numpy())
    assert recalibrate(lost, *MODEL, "--data", tmp_path / "bad.npy") == 2
    text = line(capsys)
    assert re.search(f"^batchnorm: .*{message}", text), text
    assert not (tmp_path / "net.recalibrated.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "small_network:loader"], "batchnorm recalibrate: Missing option '--model'."),
        (MODEL, "batchnorm recalibrate: Missing option '--data'."),
        ([*MODEL, *LOADER, "--batch-size", "3"], "batchnorm recalibrate: --batch-size is for files: the loader"),
        ([*MODEL, *LOADER, "--out", "net.safetensors"], "batchnorm recalibrate: --out must end as the checkpoint does"),
        ([*MODEL, *LOADER, "--layers", "bn9"], "batchnorm recalibrate: --layers: no batch normalization layer matches"),
        ([*MODEL, *LOADER, "--tolerance", "nan"], "batchnorm recalibrate: Invalid value for '--tolerance'"),
        ([*MODEL, *LOADER, "--device", "nowhere"], "batchnorm: device 'nowhere' cannot be used here"),
        ([*MODEL, "--data", "small_network:absent"], "batchnorm: small_network has no 'absent'"),
        ([*MODEL, "--data", "inputs.csv"], "batchnorm: 'inputs.csv' names no"),
        (["--model", "torch.nn:Identity", *LOADER], "batchnorm: the model has no batch normalization layer"),
        (["--model", "small_network:on_meta", *LOADER], "batchnorm: moving the model to cpu: NotImplementedError: "),
        (["--model", "small_network:lazy", *LOADER], "batchnorm: 'bn1', 'bn2' have no sizes yet: let the function"),
        (["--model", "small_network:inputs", *LOADER], "batchnorm: small_network:inputs() returned something of type"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, lost: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(lost.parent)
    assert recalibrate("net.pt", *arguments) == 2
    assert line(capsys).startswith(message)
    assert os.listdir(lost.parent) == ["net.pt"]


def test_an_earlier_file_is_overwritten_by_force_alone_and_the_checkpoint_never(
    lost: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "net.recalibrated.pt"
    out.write_bytes(b"earlier")
    assert recalibrate(lost, *MODEL, "--data", data) == 2
    assert line(capsys) == f"batchnorm: {out} exists already: choose another --out, or overwrite it with --force"
    assert out.read_bytes() == b"earlier"
    assert recalibrate(lost, *MODEL, "--data", data, "--force", "--out", lost) == 2
    assert "is the checkpoint itself" in line(capsys)
    assert recalibrate(lost, *MODEL, "--data", data, "--force") == 0
    make().load_state_dict(read(out))


def test_an_interrupt_while_measuring_leaves_nothing_behind(lost: Path, data: str, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.Linear, "forward", interrupted)
    assert recalibrate(lost, *MODEL, "--data", data) == main.INTERRUPTED
    assert sorted(os.listdir(lost.parent)) == ["inputs.npy", "net.pt"]


def test_an_interrupt_while_writing_leaves_nothing_behind(lost: Path, data: str, monkeypatch: pytest.MonkeyPatch):
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    assert recalibrate(lost, *MODEL, "--data", data) == main.INTERRUPTED
    assert sorted(os.listdir(lost.parent)) == ["inputs.npy", "net.pt"]


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    lost: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert recalibrate(lost, *MODEL, "--data", data) == 2
    assert line(capsys).startswith("batchnorm: [Errno 28] No space left on device: ")
    assert sorted(os.listdir(lost.parent)) == ["inputs.npy", "net.pt"]


def test_a_reader_of_the_table_that_has_gone_takes_nothing_from_the_file(lost: Path, tmp_path: Path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*BATCHNORM, "recalibrate", str(lost), *MODEL, *LOADER],
            stdout=writer,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
            text=True,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"wrote {tmp_path / 'net.recalibrated.pt'}"
    make().load_state_dict(read(tmp_path / "net.recalibrated.pt"))
