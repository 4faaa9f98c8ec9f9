"""``batchnorm doctor`` with models and data: what rules are given, and whose fault a fault is."""

import json
from pathlib import Path

import numpy as np
import pytest
from doctoring import LOADER, MODEL, doctor, install, lines, seen

from batchnorm.doctor.rule import Needs
from small_network import inputs, trained

pytestmark = pytest.mark.usefixtures("own_folder")


def test_rules_that_need_a_model_see_the_state_of_the_file(
    healthy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    install(monkeypatch, seen, Needs.MODEL)
    assert doctor(healthy) == 0
    assert "Not run: BN999 needs --model." in lines(capsys)[0]
    assert doctor(healthy, *MODEL, "--output-format", "json") == 1
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["source"] == "net.pt"
    assert record["not_run"] == []
    assert record["findings"][0]["measured"]["mean"] == pytest.approx(trained().bn1.running_mean.tolist())
    assert captured.err.splitlines()[0] == "running the code of small_network"


def test_rules_that_need_data_get_them(
    healthy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    install(monkeypatch, seen, Needs.MODEL, Needs.DATA)
    np.save("inputs.npy", inputs().numpy())
    assert doctor(healthy) == 0
    assert "Not run: BN999 needs --model and --data." in lines(capsys)[0]
    assert doctor(healthy, *MODEL) == 0
    assert "Not run: BN999 needs --data." in lines(capsys)[0]
    for data, sizes in ((LOADER, [8, 8, 8]), (["--data", "inputs.npy", "--batch-size", 12], [12, 12])):
        assert doctor(healthy, *MODEL, *data, "--output-format", "json") == 1
        measured = json.loads(capsys.readouterr().out)["findings"][0]["measured"]
        assert measured["batches"] == [[size, 3, 8, 8] for size in sizes]


def test_findings_of_the_file_stay_when_a_model_is_given(
    lost: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    install(monkeypatch, seen, Needs.MODEL)
    assert doctor(lost, *MODEL, "--output-format", "json") == 1
    captured = capsys.readouterr()
    found = [(each["code"], each["layer"]) for each in json.loads(captured.out)["findings"]]
    assert found == [("BN100", "bn1"), ("BN100", "bn2"), ("BN999", "bn1")]
    assert "running statistics missing: 'bn1', 'bn2'" in captured.err


def test_a_model_is_examined_as_it_is_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    install(monkeypatch, seen, Needs.MODEL)
    assert doctor("small_network:trained", "--output-format", "json") == 1
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["source"] == "small_network:trained"
    assert [found["code"] for found in record["findings"]] == ["BN999"]
    assert record["not_run"][0] == {"code": "BN001", "name": "unsafe-globals", "needs": ["file"]}
    assert captured.err.splitlines()[0] == "running the code of small_network"
    assert doctor("small_network:trained", *MODEL) == 2
    assert lines(capsys)[1][0].startswith("batchnorm doctor: TARGET is the model already")


USERS = """
import torch
from torch import nn

def narrow():
    print("printed while building")
    return nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))

def fine():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

lazy = nn.Sequential(nn.LazyBatchNorm2d())
nothing = []

def failing():
    raise RuntimeError("inside")
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["users.py:narrow", *LOADER],
            "batchnorm: users.py:narrow on an input of size (8, 3, 8, 8) and type float32: Runt",
        ),
        (["users.py:fine", "--data", "users.py:nothing"], "batchnorm: users.py:fine: the data has no batches"),
        (["users.py:fine", "--data", "users.py:failing"], "batchnorm: users.py:failing: RuntimeError: inside"),
        (["users.py:failing"], "batchnorm: users.py:failing(): RuntimeError: inside"),
        (["users.py:lazy"], "batchnorm: users.py:lazy: layer '0' is lazy"),
        (["net.pt", "--model", "users.py:fine"], "batchnorm: net.pt does not fit the model: "),
    ],
)
def test_a_fault_of_the_users_code_is_one_line(
    arguments: list[str],
    message: str,
    healthy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    install(monkeypatch, seen, Needs.MODEL)
    Path("users.py").write_text(USERS)
    assert doctor(*arguments) == 2
    out, err = lines(capsys)
    assert out == []
    assert err[-1].startswith(message)
    assert not any(text.startswith("Traceback") for text in err)
