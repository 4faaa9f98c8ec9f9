"""The user's code is found as Python would find it, and each of its failures is one line that says where."""

import sys
from pathlib import Path

import pytest
from torch import nn

from batchnorm.cli.user_code import UserCodeError, announce, build_model, failures, find
from small_network import Network, make

MODELS = """
from torch import nn

class Factories:
    @staticmethod
    def small():
        return nn.BatchNorm1d(3)

model = nn.BatchNorm1d(5)
number = 7

def make():
    print("building")
    return nn.BatchNorm1d(4)

def fails():
    sizes = {}
    return nn.BatchNorm1d(sizes["width"])

def refused():
    return nn.Linear(2, "three")

def none():
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The current folder, with the user's models; what was imported from it is forgotten."""
    (tmp_path / "user_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("target", "features"),
    [
        ("user_models:make", 4),
        ("user_models:Factories.small", 3),
        ("user_models:model", 5),
        ("user_models.py:make", 4),
        ("./user_models.py:Factories.small", 3),
    ],
)
def test_a_model_comes_from_a_module_or_a_file_of_the_current_folder(target: str, features: int):
    assert build_model(target).num_features == features


def test_a_model_comes_from_an_installed_module_and_may_be_a_class():
    assert isinstance(build_model("small_network:Network"), Network)
    assert find("small_network:make") is make


def test_a_module_in_a_package_of_the_current_folder_is_found(folder: Path):
    (folder / "user_package").mkdir()
    (folder / "user_package" / "nets.py").write_text(MODELS)
    assert isinstance(build_model("user_package.nets:make"), nn.BatchNorm1d)


def test_a_file_can_import_its_neighbours_and_hold_dataclasses(folder: Path):
    (folder / "deep").mkdir()
    (folder / "deep" / "neighbour.py").write_text("WIDTH = 6")
    (folder / "deep" / "nets.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour import WIDTH\n"
        "from torch import nn\n@dataclass\nclass Sizes:\n    width: int = WIDTH\n"
        "def make():\n    return nn.BatchNorm1d(Sizes().width)\n"
    )
    assert build_model(str(folder / "deep" / "nets.py") + ":make").num_features == 6


def test_what_the_users_code_prints_goes_to_standard_error(capsys: pytest.CaptureFixture[str]):
    build_model("user_models:make")
    assert capsys.readouterr() == ("", "building\n")


def test_whose_code_runs_is_said_once(capsys: pytest.CaptureFixture[str]):
    announce("nets.py:make", "nets.py:loader", "data.sets:loader", "no code")
    assert capsys.readouterr() == ("", "running the code of nets.py\nrunning the code of data.sets\n")


def test_a_file_that_is_named_twice_runs_once(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "nets.py").write_text("print('imported')\nclass Net: pass")
    assert find("nets.py:Net") is find("./nets.py:Net")
    assert capsys.readouterr().err == "imported\n"
    (folder / "other").mkdir()
    (folder / "other" / "nets.py").write_text("class Net: pass")
    assert find("other/nets.py:Net") is not find("nets.py:Net")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("user_models", r"'user_models' names no code: expected package.module:name or path/to/file.py:name"),
        ("user_models:", r"'user_models:' names no code"),
        ("user_modelz:make", r"there is no module 'user_modelz', installed or in /.*"),
        ("user_models.deep:make", r"there is no module 'user_models.deep', installed or in /.*"),
        ("nowhere.py:make", r"there is no file nowhere.py"),
        ("user_models:makes", r"user_models has no 'makes'; did you mean 'make'\?"),
        ("user_models:Factories.large", r"user_models has no 'Factories.large'"),
        ("user_models:number", r"user_models:number is of type int: expected a function that returns the model"),
        ("user_models:none", r"user_models:none\(\) returned something of type NoneType, expected a torch.nn.Module"),
        ("user_models:fails", r"user_models:fails\(\): KeyError: 'width' \(.*/user_models.py:18\)"),
        ("user_models:refused", r"user_models:refused\(\): TypeError: .* \(.*/user_models.py:21\)"),
    ],
)
def test_each_mistake_is_one_line(target: str, message: str):
    with pytest.raises(UserCodeError, match=f"^{message}") as caught:
        build_model(target)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_like_this", r"ModuleNotFoundError: No module named 'nothing_like_this' \(.*broken.py:1\)"),
        ("x = 1\n\nraise RuntimeError('two\\nlines')", r"RuntimeError: two lines \(.*broken.py:3\)"),
        ("def f(:", r"SyntaxError: .*broken.py, line 1\)"),
        ("import sys\nsys.exit(2)", r"ended the process \(2\) \(.*broken.py:2\): guard the script part"),
    ],
)
@pytest.mark.parametrize("target", ["broken:make", "broken.py:make"])
def test_a_module_that_fails_is_one_line(source: str, message: str, target: str, folder: Path):
    (folder / "broken.py").write_text(source)
    with pytest.raises(UserCodeError, match=f"^importing broken.*{message}") as caught:
        build_model(target)
    assert "\n" not in str(caught.value)


def test_an_interrupt_is_none_of_these():
    with pytest.raises(KeyboardInterrupt, match=r"^$"), failures("anything"):
        raise KeyboardInterrupt
