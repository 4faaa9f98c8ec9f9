"""Checkpoints of all kinds are read without running code, and written back with everything that they held."""

import pickle
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from batchnorm.cli.checkpoints import read_checkpoint, unwrapped, write_checkpoint
from batchnorm.cli.outputs import check_output
from batchnorm.errors import DataError
from small_network import Network, save, trained


def same(a: Any, b: Any) -> bool:
    """Equality of what a checkpoint holds, with types and the order of names."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b


def documents() -> dict[str, Any]:
    """What people save, by a name for each."""
    network = trained()
    state = network.state_dict()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    return {
        "bare": state,
        "plain dict": dict(state),
        "lightning": {"epoch": 3, "state_dict": state, "hparams": {"lr": 0.1, "name": "a"}, "callbacks": {}},
        "trainer": {"model": state, "optimizer": optimizer.state_dict(), "best": 0.5, "rng": torch.get_rng_state()},
        "average beside it": {"model_ema": dict(state), "model_state_dict": state, "step": torch.tensor(3)},
        "options and numbers": {"model": state, "args": Namespace(lr=0.1, out=None), "best": np.float64(0.5)},
        "unusual name": {"generator": state, "step": 3},
        "extra state": OrderedDict({**state, "tokenizer._extra_state": {"version": 2}}),
    }


@pytest.mark.parametrize("kind", documents())
def test_a_checkpoint_is_written_back_as_it_was(kind: str, tmp_path: Path):
    document = documents()[kind]
    read = read_checkpoint(save(tmp_path / "a.pt", document))
    state = next(
        (document[key] for key in ("state_dict", "model", "model_state_dict", "generator") if key in document), document
    )
    assert same(read.state, state)
    write_checkpoint(tmp_path / "b.pt", read)
    assert same(torch.load(tmp_path / "b.pt", weights_only=False), document)


def test_a_change_of_the_state_is_a_change_of_the_document_and_of_nothing_else(tmp_path: Path):
    document = documents()["average beside it"]
    read = read_checkpoint(save(tmp_path / "a.pt", document))
    read.state["bn1.running_mean"] = torch.ones(4)
    write_checkpoint(tmp_path / "b.pt", read)
    document["model_state_dict"]["bn1.running_mean"] = torch.ones(4)
    assert same(torch.load(tmp_path / "b.pt", weights_only=True), document)


def test_versions_of_modules_are_kept(tmp_path: Path):
    state = trained().state_dict()
    assert state._metadata["bn1"] == {"version": 2}
    read = read_checkpoint(save(tmp_path / "a.pt", state))
    write_checkpoint(tmp_path / "b.pt", read)
    assert torch.load(tmp_path / "b.pt", weights_only=True)._metadata == state._metadata


def test_a_safetensors_file_keeps_its_metadata(tmp_path: Path):
    state, metadata = dict(trained().state_dict()), {"format": "pt", "license": "mine"}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", metadata)
    read = read_checkpoint(tmp_path / "a.safetensors")
    write_checkpoint(tmp_path / "b.safetensors", read)
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == metadata
    found = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda network: network, ""),
        (nn.DataParallel, "module."),
        (compiled, "_orig_mod."),
        (lambda network: nn.DataParallel(compiled(network)), "module._orig_mod."),
        (lambda network: compiled(nn.DataParallel(network)), "_orig_mod.module."),
    ],
)
def test_names_are_the_models_whatever_wrapped_it(wrap: Any, prefix: str):
    state = wrap(trained()).state_dict()
    names, found = unwrapped(state, Network())
    assert found == prefix
    assert same(dict(names), dict(trained().state_dict()))
    assert names._metadata["bn1"] == {"version": 2}
    assert next(iter(state)).startswith(prefix)
    assert state._metadata[f"{prefix}bn1"] == {"version": 2}


def test_a_model_whose_part_is_called_module_needs_nothing_taken_away():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.BatchNorm1d(3)

    state = Holder().state_dict()
    assert unwrapped(state, Holder()) == (state, "")
    assert unwrapped(nn.DataParallel(Holder()).state_dict(), Holder())[1] == "module."


def test_names_of_another_model_stay_as_they_are():
    state = {"module.encoder.weight": torch.ones(2)}
    assert unwrapped(state, Network()) == (state, "")


class Configuration:
    """Something that only code can bring back."""


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_needs_code_is_refused_and_runs_none(tmp_path: Path):
    save(tmp_path / "a.pt", {"state_dict": trained().state_dict(), "config": Configuration()})
    message = r"a.pt holds an object of \S*Configuration, and to read it would run code that the file names: save model"
    with pytest.raises(DataError, match=message) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    save(tmp_path / "b.pt", {"state_dict": trained().state_dict(), "trap": Trap(tmp_path / "ran")})
    with pytest.raises(DataError, match=r"b.pt holds an object of \S+, and to read it would run code"):
        read_checkpoint(tmp_path / "b.pt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_model_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds an object of small_network.Network, and to read it would run code"):
        read_checkpoint(save(tmp_path / "a.pt", trained()))


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "last byte", "pickle"])
def test_a_damaged_file_is_one_line(name: str, damage: str, tmp_path: Path):
    path = tmp_path / name
    if name.endswith("pt"):
        save(path, trained().state_dict())
    else:
        safetensors.torch.save_file(dict(trained().state_dict()), path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"not a checkpoint\n" * 9,
            "half": data[: len(data) // 2],
            "last byte": data[:-1],
            "pickle": pickle.dumps({"a": 1}),
        }[damage]
    )
    with pytest.raises(
        DataError, match=rf"{name} (is no checkpoint, or damaged \(.+\)$|holds no state_dict)"
    ) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors"])
def test_a_missing_file_and_a_folder_are_errors_of_the_system(name: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=name):
        read_checkpoint(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=name):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"epoch": 3, "loss": [1.0]}, r"holds no state_dict, but a dict of 'epoch', 'loss'$"),
        ([1, 2], r"holds no state_dict, but a list$"),
        (torch.ones(3), r"holds no state_dict, but a Tensor$"),
        ({}, r"holds no state_dict, but a dict of nothing$"),
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, r"holds several state_dicts, 'a', 'b': save the one"),
        ({str(i): i for i in range(9)}, r"a dict of '0', '1', '2', '3', '4' and 4 more$"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(document: Any, message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        read_checkpoint(save(tmp_path / "a.pt", document))


def test_nothing_is_written_over_what_exists(tmp_path: Path):
    source = save(tmp_path / "a.pt", {})
    (tmp_path / "link.pt").symlink_to(source)
    (tmp_path / "old.pt").touch()
    for force in (False, True):
        with pytest.raises(DataError, match=r"a.pt is the checkpoint itself, which stays as it is"):
            check_output(source, source, force)
        with pytest.raises(DataError, match=r"link.pt is the checkpoint itself"):
            check_output(tmp_path / "link.pt", source, force)
        with pytest.raises(DataError, match=r"is a folder$"):
            check_output(tmp_path, source, force)
        with pytest.raises(DataError, match=r"there is no folder .*nowhere for b.pt$"):
            check_output(tmp_path / "nowhere" / "b.pt", source, force)
        check_output(tmp_path / "new.pt", source, force)
    with pytest.raises(DataError, match=r"old.pt exists already: choose another --out, or overwrite it with --force"):
        check_output(tmp_path / "old.pt", source, False)
    check_output(tmp_path / "old.pt", source, True)
