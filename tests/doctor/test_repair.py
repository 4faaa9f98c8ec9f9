"""Repair of files and state dicts: what is broken becomes right, everything else stays what it was, bit for bit."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.doctor.fixes.outcome import Action
from batchnorm.doctor.fixes.tensors import converted_variance
from batchnorm.doctor.read.open import read
from batchnorm.errors import DataError
from batchnorm.functional import batch_norm
from small_network import Network, Twice, inputs, make, save, trained, without_statistics

FILES = Path(__file__).parent / "files"
LOADER = list(inputs().split(8))
NO_INFO = ("BN201", "BN205", "BN206", "BN207", "BN501", "BN502")


def repair(target: Any, **options: Any) -> Any:
    return batchnorm.repair(target, ignore=NO_INFO, **options)


def measured(target: Any, **options: Any) -> Any:
    return repair(target, model=make(), loader=LOADER, unsafe=True, **options)


def actions(repaired: Any) -> list[tuple[str, str, str]]:
    return [(each.code, each.layer, each.action.value) for each in repaired.outcomes]


def evaluation_inputs(network: Network, x: Tensor) -> dict[str, Tensor]:
    """What goes into each layer in evaluation, in float64."""
    found = {}
    hooks = [
        getattr(network, name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name in ("bn1", "bn2")
    ]
    network.double().eval()(x.double())
    for hook in hooks:
        hook.remove()
    return found


def test_lost_statistics_become_those_of_what_goes_into_the_layers_in_evaluation(tmp_path: Path):
    lost = save(tmp_path / "net.pt", {"epoch": 7, "state_dict": without_statistics(trained().state_dict())})
    before = lost.read_bytes()
    repaired = measured(lost)
    assert lost.read_bytes() == before
    assert actions(repaired) == [("BN100", "state_dict.bn1", "fixed"), ("BN100", "state_dict.bn2", "fixed")]
    network = make()
    assert str(network.load_state_dict(repaired.state_dict())) == "<All keys matched successfully>"
    state = network.state_dict()
    for name, x in evaluation_inputs(network, inputs()).items():
        torch.testing.assert_close(state[f"{name}.running_mean"].double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state[f"{name}.running_var"].double(), x.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_what_is_written_has_none_of_the_findings_and_keeps_all_other_tensors(tmp_path: Path, ending: str):
    lost = save(tmp_path / "net.pt", {"epoch": 7, "state_dict": without_statistics(trained().state_dict())})
    repaired = measured(lost)
    (path,) = repaired.save(tmp_path / f"new{ending}")
    assert batchnorm.examine(path).findings == repaired.left.findings == []
    document = safetensors.torch.load_file(path) if ending == ".safetensors" else torch.load(path)
    state = document if ending == ".safetensors" else document["state_dict"]
    assert ending == ".safetensors" or document["epoch"] == 7
    for name, value in without_statistics(trained().state_dict()).items():
        assert torch.equal(state[name], value)
    assert state.keys() == make().state_dict().keys()


def test_only_broken_layers_are_measured_and_digests_tell():
    state = trained().state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    state["bn2.running_var"][1] = torch.nan
    repaired = measured(state)
    assert actions(repaired) == [("BN102", "bn2", "fixed")]
    changed = {change.name: change for change in repaired.comparison.changed}
    assert changed.keys() <= {"bn2.running_mean", "bn2.running_var", "bn2.num_batches_tracked"}
    new = repaired.state_dict()
    for name, before in kept.items():
        if name not in changed:
            assert repaired.comparison.unchanged[name] == hashlib.sha256(before.numpy().tobytes()).hexdigest()
            assert torch.equal(new[name], before)
    var = changed["bn2.running_var"]
    assert var.sha256[1] == hashlib.sha256(new["bn2.running_var"].numpy().tobytes()).hexdigest()
    assert var.largest is None


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_made_longer_fit_the_model(prefix: str):
    state = {f"{prefix}{name}": value for name, value in without_statistics(trained().state_dict()).items()}
    repaired = measured(state)
    assert {f"{prefix}bn1.running_mean", f"{prefix}bn2.running_var"} <= repaired.tensors.keys()
    assert repaired.left.findings == []


def test_the_model_says_which_layers_there_are_where_names_do_not():
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    lost = dict(network.named_parameters())
    assert batchnorm.examine(lost).layers == []
    repaired = repair(lost, model=network, loader=[torch.randn(9, 4)], unsafe=True)
    assert actions(repaired) == [("BN100", "1", "fixed")]


def test_a_layer_with_two_names_gets_its_statistics_under_both():
    network = Twice()
    state = without_statistics(network.state_dict())
    repaired = repair(state, model=network, loader=[inputs()], unsafe=True, select="BN100")
    assert {layer: action for _, layer, action in actions(repaired)} == {
        "first": "fixed",
        "again": "fixed",
        "idle": "refused",
    }
    assert [each.what for each in repaired.outcomes if each.layer == "idle"] == ["no batch reached it"]
    new = repaired.state_dict()
    assert torch.equal(new["first.running_mean"], new["again.running_mean"])


def test_nothing_unsafe_is_done_without_leave_nor_anything_without_data():
    lost = without_statistics(trained().state_dict())
    for repaired, why in (
        (repair(lost, model=make(), loader=LOADER), "unsafe=True"),
        (repair(lost, unsafe=True), "need a model and data"),
    ):
        assert [each.action for each in repaired.outcomes] == [Action.REFUSED] * 2
        assert all(why in each.what for each in repaired.outcomes)
        assert repaired.comparison.changed == []
        assert len(repaired.left.findings) == 2


def test_a_lost_weight_is_not_measured(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    state = {name: value for name, value in model.state_dict().items() if name not in ("1.weight", "1.running_var")}
    with pytest.raises(DataError, match=r"state dict does not fit the model: it lacks '1\.weight'"):
        repair(state, model=model, loader=[torch.randn(9, 3)], unsafe=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_statistics_become_float32_with_the_same_values(dtype: torch.dtype):
    state = trained().state_dict()
    narrow = {name: value.to(dtype) if "running" in name else value for name, value in state.items()}
    repaired = repair(narrow, model=make(), loader=LOADER)
    assert [each[::2] for each in actions(repaired)] == [("BN107", "fixed")] * 2
    assert repaired.proof == "by running both on the first item of the data: their outputs are equal"
    for name, value in repaired.state_dict().items():
        assert torch.equal(value, narrow[name].to(value.dtype))
        assert value.dtype == state[name].dtype


def test_a_missing_counter_becomes_that_of_the_others_and_no_number_is_made_up():
    state = trained().state_dict()
    del state["bn2.num_batches_tracked"]
    repaired = repair(state)
    assert repaired.state_dict()["bn2.num_batches_tracked"].tolist() == 5
    assert actions(repaired) == [("BN105", "bn2", "fixed")]
    del state["bn1.num_batches_tracked"]
    unknown = repair(state)
    assert unknown.comparison.changed == []
    assert all("give their number" in each.what for each in unknown.outcomes)
    assert repair(state, batches=12).state_dict()["bn1.num_batches_tracked"].tolist() == 12


def test_another_eps_computes_the_same_in_evaluation():
    state = {name: value.double() for name, value in trained().bn1.state_dict().items()}
    x = torch.randn(50, 4, dtype=torch.float64)
    repaired = repair(state, eps_from=1e-3, eps_to=1e-5, unsafe=True)
    new = repaired.state_dict()

    def output(stored: dict[str, Tensor], eps: float) -> Tensor:
        parts = (stored[role].double() for role in ("running_mean", "running_var", "weight", "bias"))
        return batch_norm(x, *parts, eps=eps)

    assert actions(repaired) == [("BN109", "", "fixed")]
    torch.testing.assert_close(output(new, 1e-5), output(state, 1e-3), rtol=1e-12, atol=1e-12)


def test_no_layer_is_converted_in_part():
    layer = nn.BatchNorm1d(3)
    layer.running_var.copy_(torch.tensor([1.0, 1e-4, 0.5]))
    repaired = repair(layer.state_dict(), eps_from=1e-5, eps_to=1e-3, unsafe=True)
    assert repaired.comparison.changed == []
    assert [each.what for each in repaired.outcomes if each.code == "BN109"] == [
        "the variance would be negative in 1 of 3 channels (1), so the layer stays as it is"
    ]


def test_a_biased_variance_becomes_unbiased_only_with_its_count():
    x = torch.randn(7, 2, dtype=torch.float64)
    new = converted_variance(x.var(0, correction=0).numpy(), 1e-3, 1e-3, count=7)
    np.testing.assert_allclose(new, x.var(0).numpy(), rtol=1e-12)
    with pytest.raises(ValueError, match="needs 2 values per channel and batch, got 1"):
        converted_variance(np.ones(2), 1e-3, 1e-3, count=1)


def test_counts_alone_change_the_layers_that_have_one_and_no_eps():
    state = trained().state_dict()
    repaired = repair(state, counts={"bn2": 5}, unsafe=True)
    assert [change.name for change in repaired.comparison.changed] == ["bn2.running_var"]
    torch.testing.assert_close(repaired.state_dict()["bn2.running_var"], state["bn2.running_var"] * 5 / 4)
    assert [each.what for each in repaired.outcomes] == ["variance unbiased for 5 values"]
    refused = repair(state, counts={"bn2": 5}, eps_from=1e-3, eps_to=1e-5)
    assert refused.comparison.changed == []


class BrokenError(Exception):
    pass


def failing(model: nn.Module, item: Tensor) -> None:
    model(item)
    raise BrokenError("in the middle")


def test_an_error_in_the_middle_changes_neither_model_nor_state_nor_disk(tmp_path: Path):
    lost = save(tmp_path / "net.pt", without_statistics(trained().state_dict()))
    network, before = make(), lost.read_bytes()
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(BrokenError, match="in the middle"):
        repair(lost, model=network, loader=LOADER, call=failing, unsafe=True, select="BN100")
    assert os.listdir(tmp_path) == ["net.pt"]
    assert lost.read_bytes() == before
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())
    assert network.training
    assert not network.bn1._forward_pre_hooks


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: Any, ending: str, force: bool):
    lost = save(tmp_path / "net.pt", without_statistics(trained().state_dict()))
    out = tmp_path / f"new{ending}"
    if force:
        out.write_bytes(b"an earlier one")
    names = sorted(os.listdir(tmp_path))
    repaired = measured(lost)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        repaired.save(out, force=force)
    assert sorted(os.listdir(tmp_path)) == names
    assert not force or out.read_bytes() == b"an earlier one"


def test_source_and_earlier_files_are_not_overwritten(tmp_path: Path):
    lost = save(tmp_path / "net.pt", without_statistics(trained().state_dict()))
    repaired = measured(lost)
    with pytest.raises(DataError, match=r"net.pt is the source itself"):
        repaired.save(lost, force=True)
    (tmp_path / "there.pt").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"there.pt exists already"):
        repaired.save(tmp_path / "there.pt")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        repaired.save(tmp_path / "nowhere" / "net.pt")
    repaired.save(tmp_path / "there.pt", force=True)
    assert batchnorm.examine(tmp_path / "there.pt").findings == []


def test_hostile_names_are_kept_in_the_file_and_harmless_in_the_report(tmp_path: Path):
    path = "evil\x1b[2J\n::error::<script>"
    state = {f"{path}.{name}": value.half() for name, value in trained().bn1.state_dict().items()}
    state[f"{path}.num_batches_tracked"] = torch.tensor(3)
    repaired = repair(save(tmp_path / "net.pt", {"state": {"a.b": torch.ones(1), **state}}), select="BN107")
    assert actions(repaired) == [("BN107", f"state.{path}", "fixed")]
    for ending in (".safetensors", ".pt"):
        (out,) = repaired.save(tmp_path / f"out{ending}")
        assert any(layer.path.endswith(path) for layer in read(out).layers)
        assert not [each for each in batchnorm.examine(out).findings if each.code == "BN107"]
    assert "\x1b" not in str(repaired)
    assert "::error" not in str(repaired)


def test_a_name_that_safetensors_cannot_hold_is_left_out(tmp_path: Path):
    from batchnorm.doctor.fixes.save import left_out

    state = {**trained().state_dict(), "__metadata__": torch.ones(2)}
    state["bn1.running_mean"] = state["bn1.running_mean"].half()
    repaired = repair(save(tmp_path / "net.pt", state), select="BN107")
    (path,) = repaired.save(tmp_path / "new.safetensors")
    assert left_out(repaired) == {"'__metadata__'": "safetensors does not allow its name"}
    assert safetensors.torch.load_file(path).keys() == state.keys() - {"__metadata__"}


def given(layers: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {layer.path: (np.full(layer.num_features, 0.5), np.full(layer.num_features, 2.0)) for layer in layers}


@pytest.mark.parametrize("out", ["fixed.ckpt", "fixed.safetensors"])
def test_a_tensorflow_checkpoint_gets_what_its_graph_says_is_missing(tmp_path: Path, out: str):
    source = FILES / "reference_trainable" / "model.ckpt"
    before = read(source)
    missing = [finding.layer for finding in batchnorm.examine(source).findings if finding.code == "BN100"]
    assert missing
    repaired = repair(source, statistics=given(before.layers), unsafe=True)
    assert [layer for code, layer, action in actions(repaired) if action == "fixed"] == missing
    paths = repaired.save(tmp_path / out)
    after = read(tmp_path / out)
    assert all(path.exists() for path in paths)
    for layer in missing:
        np.testing.assert_array_equal(after.tensors[f"{layer}/moving_variance"].load(), 2.0)
        assert after.tensors[f"{layer}/moving_mean"].dtype == "float32"
    for name, tensor in before.tensors.items():
        if name in after.tensors:
            np.testing.assert_array_equal(after.tensors[name].load(), tensor.load())
    assert not [each for each in batchnorm.examine(tmp_path / out).findings if each.code == "BN100"]
    with pytest.raises(FileExistsError, match="exists already"):
        repaired.save(tmp_path / out)


def test_a_model_of_torch_does_not_measure_a_tensorflow_checkpoint():
    source = FILES / "reference_trainable" / "model.ckpt"
    repaired = repair(source, model=make(), loader=LOADER, unsafe=True, select="BN100")
    assert all("does not fit a model of torch" in each.what for each in repaired.outcomes)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"nowhere": (0, 1)}, "statistics are given for 'nowhere', but the layers are 'bn1', 'bn2'"),
        ({"bn1": 3}, r"statistics of 'bn1': expected \(mean, variance\), got a int"),
        ({"bn1": (np.zeros(4), np.ones(5))}, r"running_var of 'bn1': expected 4 values, got \(5,\)"),
        ({"bn1": (np.zeros(4), -np.ones(4))}, "running_var of 'bn1' has NaN, infinite or negative values"),
        ({"bn1": (np.full(4, np.nan), np.ones(4))}, "running_mean of 'bn1' has NaN"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(statistics: Any, message: str):
    with pytest.raises(ValueError, match=message):
        repair(without_statistics(trained().state_dict()), statistics=statistics, unsafe=True)


def test_given_statistics_serve_broken_layers_alone():
    state = trained().state_dict()
    del state["bn2.running_mean"]
    layers = read_layers(state)
    repaired = repair(state, statistics=given(layers), unsafe=True)
    new = repaired.state_dict()
    assert torch.equal(new["bn1.running_mean"], state["bn1.running_mean"])
    assert new["bn2.running_mean"].tolist() == [0.5] * 5
    assert new["bn2.running_var"].tolist() == [2.0] * 5


def read_layers(state: Any) -> Any:
    return batchnorm.examine(state).layers


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 3}, TypeError, "expected a path, a model or a state dict, got int"),
        ({"target": {}, "loader": []}, TypeError, "a loader needs a model="),
        ({"target": nn.BatchNorm1d(2), "model": nn.BatchNorm1d(2)}, TypeError, "the target is a model already"),
        ({"target": nn.BatchNorm1d(2), "eps_to": 1e-5}, TypeError, "eps_to= and counts= are for a file"),
        ({"target": {}, "eps_to": float("nan")}, ValueError, "eps_to should be a number of at least 0, got nan"),
        ({"target": {"a.b": torch.ones(2)}, "model": make()}, DataError, "none of the model's tensors"),
    ],
)
def test_what_does_not_go_together_is_said_in_a_line(options: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        batchnorm.repair(**options)


def test_of_two_state_dicts_the_first_is_measured_and_the_other_is_named(tmp_path: Path):
    lost = without_statistics(trained().state_dict())
    repaired = measured(save(tmp_path / "net.pt", {"model": lost, "average": dict(lost)}), select="BN100")
    found = {layer: action for _, layer, action in actions(repaired)}
    assert found == {"model.bn1": "fixed", "model.bn2": "fixed", "average.bn1": "refused", "average.bn2": "refused"}
    assert {each.what for each in repaired.outcomes if each.action is Action.REFUSED} == {
        "the model is that of another part of the file"
    }
    (path,) = repaired.save(tmp_path / "new.pt")
    assert torch.load(path)["average"].keys() == lost.keys()


def test_a_model_that_was_saved_whole_is_repaired_without_running_it(tmp_path: Path):
    network = trained()
    network.bn1.running_mean = network.bn1.running_mean.half()
    repaired = repair(save(tmp_path / "whole.pt", network), select="BN107")
    (path,) = repaired.save(tmp_path / "new.safetensors")
    assert make().load_state_dict(safetensors.torch.load_file(path), strict=False).unexpected_keys == []
    with pytest.raises(DataError, match=r"whole\.pt holds an object of small_network\.Network"):
        repaired.save(tmp_path / "new.pt")
    assert sorted(os.listdir(tmp_path)) == ["new.safetensors", "whole.pt"]


def test_shards_become_one_file(tmp_path: Path):
    state = {name: value.bfloat16() if "running" in name else value for name, value in trained().state_dict().items()}
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for index, (name, value) in enumerate(state.items()):
        parts["ab"[index % 2] + ".safetensors"][name] = value
    for name, part in parts.items():
        safetensors.torch.save_file(part, tmp_path / name)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    repaired = repair(tmp_path / "model.safetensors.index.json")
    (path,) = repaired.save(tmp_path / "new.safetensors")
    for name, value in safetensors.torch.load_file(path).items():
        assert torch.equal(value, state[name].to(value.dtype))
    with pytest.raises(DataError, match=r"new\.pt: .* is written as \.safetensors alone"):
        repaired.save(tmp_path / "new.pt")


def test_a_keras_file_is_written_as_safetensors(tmp_path: Path):
    source = FILES / "keras3.weights.h5"
    before = {layer.path: layer for layer in read(source).layers}
    repaired = repair(source, eps_from=1e-3, eps_to=1e-5, unsafe=True)
    (path,) = repaired.save(tmp_path / "new.safetensors")
    written = safetensors.numpy.load_file(path)
    for layer in before.values():
        name = layer.tensors["running_var"].name
        np.testing.assert_allclose(written[name], layer.values("running_var") + 1e-3 - 1e-5, rtol=1e-6)
    with pytest.raises(DataError, match=r"is written as \.safetensors alone"):
        repaired.save(tmp_path / "new.h5")
