"""Which modules, functions and methods are an activation that our layers know, with torch's default parameters."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from batchnorm.reference import ACTIVATIONS
from batchnorm.surgery.calls import copy_structure

MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Mish: "mish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardswish: "hardswish",
}
FUNCTIONS: dict[Callable[..., Any], str] = {
    getattr(home, name + suffix): name
    for home in (F, torch)
    for name in ACTIVATIONS
    for suffix in ("", "_")
    if hasattr(home, name + suffix)
}
METHODS = {name + suffix: name for name in ACTIVATIONS for suffix in ("", "_") if hasattr(Tensor, name + suffix)}
DEFAULTS: dict[str, Any] = {"negative_slope": 0.01, "alpha": 1.0, "approximate": "none"}
PARAMETERS = {"leaky_relu": ("negative_slope", "inplace"), "elu": ("alpha", "inplace"), "gelu": ("approximate",)}
# dense where activations bend, and far out, where they may be clipped
POINTS = torch.cat([torch.linspace(-30, 30, 6001, dtype=torch.float64), torch.tensor([-1e6, -1e3, 1e3, 1e6]).double()])
CLOSE = 1e-12


def activation_of_node(node: Node, modules: dict[str, nn.Module]) -> str | None:
    """The name of the activation that a node of a graph applies, or None."""
    if node.op == "call_module":
        return activation_of_module(modules[str(node.target)]) if len(node.args) + len(node.kwargs) == 1 else None
    if node.op == "call_function":
        name = FUNCTIONS.get(node.target)  # pyright: ignore[reportArgumentType, reportCallIssue]
    else:
        name = METHODS.get(str(node.target)) if node.op == "call_method" else None
    if name is None:
        return None
    names = ("input", *PARAMETERS.get(name, ("inplace",)))
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    understood = len(node.args) <= len(names) and given.keys() <= set(names)
    usual = all(given[key] == value for key, value in DEFAULTS.items() if key in given)
    return name if understood and usual and isinstance(given.get("inplace", False), bool) else None


def activation_of_module(module: nn.Module) -> str | None:
    """The name of a module's activation: torch's by its class, others by what they compute."""
    if type(module) in MODULES:
        changed = any(getattr(module, key, value) != value for key, value in DEFAULTS.items())
        return None if changed or "forward" in vars(module) else MODULES[type(module)]
    if type(module).__module__.startswith("torch.") or next(iter(module.state_dict()), None) is not None:
        return None
    return activation_by_values(module)


def activation_by_values(module: nn.Module) -> str | None:
    """Compare values and gradients at many points, in both modes; most modules fail at the first call."""
    names = set()
    for training in (True, False):
        # a module may count its calls, or print: its copy is asked
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
                warnings.simplefilter("ignore")
                again = copy_structure(module).train(training)
                before = dict(vars(again))
                results = values_and_gradients(again)
        except Exception:
            return None
        if vars(again) != before or results is None:
            return None
        names.add(next((name for name, f in ACTIVATIONS.items() if same(results, values_and_gradients(f))), None))
    return names.pop() if len(names) == 1 else None


def values_and_gradients(f: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor] | None:
    x = POINTS.view(1, 5, -1).clone().requires_grad_()
    y = f(x)
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), gradient


def same(results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor] | None) -> bool:
    assert expected is not None
    return all(torch.allclose(a, b, rtol=CLOSE, atol=CLOSE) for a, b in zip(results, expected, strict=True))
