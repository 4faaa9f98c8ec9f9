"""``batchnorm fold``: what is written computes what the checkpoint's model does, in every format."""

import errno
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import nn

from batchnorm.cli import main
from small_network import Network, inputs, save, trained, without_statistics

MODEL = ["--model", "small_network:make"]
EXAMPLE = ["--example", "2,3,8,8"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "net.pt", {"epoch": 3, "state_dict": trained().state_dict()})


def fold(*arguments: object) -> int:
    return main.run(["fold", *map(str, arguments)])


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error, where all others announce the user's code."""
    captured = capsys.readouterr()
    assert captured.out == ""
    *before, last = captured.err.splitlines()
    assert all(text.startswith("running the code of") for text in before), captured.err
    return last


def assert_same_function(output: torch.Tensor, x: torch.Tensor) -> None:
    """Within rounding of the network that was saved, in float64."""
    with torch.no_grad():
        expected = trained().double()(x.double())
    torch.testing.assert_close(output.detach().double(), expected, rtol=1e-5, atol=1e-5)


class Folded(Network):
    """The network as the message says: nothing in place of the folded layers, and a bias more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1, self.bn2 = nn.Identity(), nn.Identity()


@pytest.mark.parametrize("name", ["net.folded.pt", "new.safetensors"])
def test_a_state_dict_loads_into_the_network_without_the_layers(
    name: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    out = checkpoint.with_name(name)
    assert fold(checkpoint, *MODEL, *EXAMPLE, *([] if name.startswith("net") else ["--out", out])) == 0
    state = torch.load(out, weights_only=True) if name.endswith("pt") else safetensors.torch.load_file(out)
    network = Folded()
    network.load_state_dict(state)
    assert_same_function(network.eval()(inputs()), inputs())
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"wrote {out}: a state_dict of the model with torch.nn.Identity() in place of each folded layer and with "
        "'conv1.bias'"
    )


def test_a_program_runs_batches_of_any_size_without_the_code_of_the_model(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "net.pt2"
    assert fold(checkpoint, *MODEL, "--example", "1,3,8,8", "--out", out) == 0
    program = torch.export.load(out)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    for count in (1, 2, 24):
        assert_same_function(program.module()(inputs()[:count]), inputs()[:count])


def test_an_onnx_file_runs_batches_of_any_size(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = tmp_path / "net.onnx"
    assert fold(checkpoint, *MODEL, *EXAMPLE, "--out", out) == 0
    # the weights are in the file
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.pt"]
    assert len(capfd.readouterr().err.splitlines()) == 2
    session = onnxruntime.InferenceSession(str(out))
    for count in (1, 2, 24):
        (output,) = session.run(None, {session.get_inputs()[0].name: inputs()[:count].numpy()})
        assert_same_function(torch.from_numpy(output), inputs()[:count])


def test_the_table_says_what_was_folded_and_the_checkpoint_stays(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    before = checkpoint.read_bytes()
    assert fold(checkpoint, *MODEL) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["layer", "what"]
    assert [row.split()[:4] for row in rows] == [["bn1", "folded", "into", "conv1"], ["bn2", "folded", "into", "conv2"]]
    assert checkpoint.read_bytes() == before


def test_an_example_comes_from_a_file_or_a_loader_too(checkpoint: Path, tmp_path: Path):
    np.save(tmp_path / "x.npy", inputs().numpy())
    for source in (tmp_path / "x.npy", "small_network:loader"):
        assert fold(checkpoint, *MODEL, "--example", source, "--out", tmp_path / "net.pt2", "--force") == 0
        assert_same_function(torch.export.load(tmp_path / "net.pt2").module()(inputs()), inputs())


def test_a_layer_that_cannot_be_folded_is_left_alone_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3))"
    )
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3))
    model(torch.randn(9, 3))
    path = save(tmp_path / "a.pt", model.state_dict())
    assert fold(path, "--model", f"{tmp_path / 'net.py'}:make") == 0
    assert "left alone" in capsys.readouterr().out
    assert torch.load(tmp_path / "a.folded.pt", weights_only=True).keys() == model.state_dict().keys()


def test_statistics_that_were_lost_are_refused_with_the_command_that_measures_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = save(tmp_path / "net.pt", without_statistics(trained().state_dict()))
    assert fold(path, *MODEL) == 2
    text = line(capsys)
    assert text.startswith(f"batchnorm: {path}: ")
    assert "'bn1' (missing)" in text
    assert text.endswith(f"batchnorm recalibrate {path}")
    assert os.listdir(tmp_path) == ["net.pt"]


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = save(tmp_path / "net.pt", {**trained().state_dict(), "fc.bias": torch.ones(3)})
    assert fold(path, *MODEL) == 2
    assert line(capsys).startswith(f"batchnorm: {path} does not fit the model: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "batchnorm fold: Missing option '--model'."),
        ([*MODEL, "--out", "a.pt2"], "batchnorm fold: .pt2 needs --example"),
        ([*MODEL, "--out", "net.pt", "--force"], "batchnorm: net.pt is the checkpoint itself"),
        ([*MODEL, "--out", "nowhere/a.pt"], "batchnorm: there is no folder nowhere for a.pt"),
        ([*MODEL, "--example", "2,2,8,8"], "batchnorm: small_network:make: the model does not run on the example"),
        ([*MODEL, "--example", "2x3"], "batchnorm: '2x3' names no"),
        (
            [*MODEL, "--example", "0,3,8,8"],
            "batchnorm: 0,3,8,8: expected a batch of inputs, found an array of size (0,",
        ),
        (["--model", "small_network:absent"], "batchnorm: small_network has no 'absent'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(checkpoint.parent)
    assert fold("net.pt", *arguments) == 2
    assert line(capsys).startswith(message)
    assert os.listdir(checkpoint.parent) == ["net.pt"]


def test_without_the_onnx_packages_their_extra_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert fold(checkpoint, *MODEL, *EXAMPLE, "--out", checkpoint.with_name("net.onnx")) == 2
    assert line(capsys) == "batchnorm: to write .onnx takes other packages: pip install 'batchnorm[onnx]'"


def test_a_model_that_cannot_be_exported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.bn = nn.BatchNorm1d(3)\n    def forward(self, x):\n"
        "        return self.bn(x) if float(x.sum()) > 1e9 else x\n"
    )
    bn = nn.BatchNorm1d(3)
    bn(torch.randn(9, 3))
    path = save(tmp_path / "a.pt", {f"bn.{name}": value for name, value in bn.state_dict().items()})
    out = tmp_path / "a.pt2"
    assert fold(path, "--model", f"{tmp_path / 'net.py'}:Net", "--example", "4,3", "--out", out) == 2
    assert line(capsys).startswith(f"batchnorm: exporting {tmp_path / 'net.py'}:Net: ")
    assert not out.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_an_interrupt_and_a_full_disk_leave_nothing_behind(
    error: BaseException, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fails)
    assert fold(checkpoint, *MODEL) == (main.INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2)
    assert os.listdir(checkpoint.parent) == ["net.pt"]
