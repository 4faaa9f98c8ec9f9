"""Every public name is documented with an example, and every public layer prints, copies and pickles."""

import copy
import dataclasses
import importlib
import pickle
import types

import pytest
import torch

import batchnorm
import batchnorm.nn
from batchnorm import errors
from batchnorm._ops import choice

PACKAGES = ("batchnorm", "batchnorm.insight", "batchnorm.nn", "batchnorm.statistics", "batchnorm.surgery")


def shows_an_example(value: object) -> bool:
    """Not modules, and not records: the function that returns a record shows it."""
    record = isinstance(value, type) and (issubclass(value, tuple) or dataclasses.is_dataclass(value))
    return not record and not isinstance(value, types.ModuleType)


PUBLIC = [
    (package, name)
    for package in PACKAGES
    for name in importlib.import_module(package).__all__
    if shows_an_example(getattr(importlib.import_module(package), name))
] + [("batchnorm.functional", name) for name in ("batch_norm", "batch_norm_train", "batch_norm_inference", "whiten")]
LAYERS = [value for value in vars(batchnorm.nn).values() if isinstance(value, type)]


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=".".join)
def test_public_name_has_a_docstring_with_an_example(package, name):
    value = getattr(importlib.import_module(package), name)
    assert value.__doc__, f"{package}.{name} has no docstring"
    assert "Example:" in value.__doc__, f"{package}.{name} shows no example"
    assert ">>> " in value.__doc__


def test_every_public_name_exists_and_is_listed():
    for name in batchnorm.__all__:
        assert getattr(batchnorm, name) is not None
    assert dir(batchnorm) == sorted(batchnorm.__all__)


def test_unknown_name_is_an_attribute_error_with_the_name():
    with pytest.raises(AttributeError, match="module 'batchnorm' has no attribute 'batchnorm2d'"):
        _ = batchnorm.batchnorm2d


def test_every_error_is_a_batch_norm_error():
    own = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(error, errors.BatchNormError) for error in own)
    drawn = errors.__doc__
    assert all(error.__name__ in drawn for error in own)


# what a layer gets besides num_features
OWN = {
    "Ghost": {"ghost_batch_size": 2, "activation": "relu"},
    "Domain": {"num_domains": 2, "activation": "relu"},
    "Conditional": {"num_classes": 2, "activation": "relu"},
    "Whitening": {"method": "cholesky"},
}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda cls: cls.__name__)
def test_layer_prints_copies_and_pickles(layer):
    own = next((own for name, own in OWN.items() if layer.__name__.startswith(name)), {"activation": "relu"})
    one = layer(3, momentum=None, bias=False, **own)
    assert repr(one).startswith(f"{layer.__name__}(")
    own_words = [f"{name}={value}" for name, value in own.items() if not name.startswith("num_")]
    for shown in ("(3, eps=1e-05, momentum=None, affine=", "bias=False", *own_words):
        assert shown in repr(one)
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert repr(again) == repr(one)
        assert not set(map(id, again.parameters())) & set(map(id, one.parameters()))
        torch.testing.assert_close(dict(again.state_dict()), dict(one.state_dict()))


def test_repr_names_every_implementation():
    for implementation in choice.IMPLEMENTATIONS:
        assert f"implementation={implementation}" in repr(batchnorm.nn.BatchNorm1d(3, implementation=implementation))


def test_environment_is_plain_data_without_names_of_users():
    import getpass
    import json

    written = json.dumps(batchnorm.describe_environment())
    assert json.loads(written)["packages"]["torch"] == torch.__version__
    assert f'"{getpass.getuser()}"' not in written
