"""Who is measured: our layer, and what one would use instead. Each computes the same from the same tensors."""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm.nn
from batchnorm.benchmarks.cases import BOTH, EVALUATION, Case, Inputs, make_inputs
from batchnorm.benchmarks.correctness import EPS, MOMENTUM
from batchnorm.reference import ACTIVATIONS, activate

OURS, TORCH, INPLACE, COMPILE, JAX, COPY = "ours", "torch", "torch-inplace", "torch.compile", "jax", "copy"
PEERS = (TORCH, INPLACE, COMPILE, JAX)
# Of the whitening layers: the research code's formulation, and the layer that whitening stands in for
MATRIX, BATCH_NORM = "matrix", "batchnorm"
# The same network or step without what is measured
WITHOUT = "without"
# Those that torch overwrites without keeping a copy for backward
IN_PLACE: dict[str | None, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "relu6": nn.ReLU6(inplace=True)}


class PeerUnavailableError(Exception):
    """Something that is compared with is not installed; the message says how to install it."""


@dataclass
class Runner:
    """One peer, ready to run one pass of one case.

    Attributes:
        call: runs the pass and returns what it computed, in the peer's own arrays.
        as_tensors: what ``call`` returned as tensors: output, then gradients of input, weight, bias and residual.
        statistics: the running mean and variance as they are now.
        notes: what belongs in the record.
    """

    call: Callable[[], Any]
    as_tensors: Callable[[Any], list[Tensor]]
    statistics: Callable[[], list[Tensor]]
    notes: dict[str, Any] = field(default_factory=dict)


Layer = Callable[..., Tensor]


def why_unavailable(peer: str) -> str | None:
    """Try a peer on something small; None if it runs here. Compilers are loaded and warm afterwards."""
    case = Case("trial", (4, 3))
    try:
        prepare(peer, case, BOTH, make_inputs(case)).call()
    except Exception as error:
        return one_line(error)
    return None


def one_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, PeerUnavailableError) else f"{type(error).__name__}: {text}"


def serves(peer: str, case: Case) -> bool:
    """Whether a peer has a form of the case that is not another peer's."""
    return peer != INPLACE or case.activation in IN_PLACE


def prepare(peer: str, case: Case, pass_: str, inputs: Inputs) -> Runner:
    """Make a runner; running statistics begin at those of the inputs.

    Raises:
        PeerUnavailableError: the peer is not installed.
    """
    if peer == JAX:
        if importlib.util.find_spec("jax") is None:
            raise PeerUnavailableError("JAX is not installed: pip install 'batchnorm[bench]'")
        from batchnorm.benchmarks.jax_peer import prepare_jax

        return prepare_jax(case, pass_, inputs)
    norm, layer = LAYERS[peer](case, inputs)
    runner = run_torch(layer, norm, pass_, inputs)
    if peer == OURS:
        runner.notes["implementation"] = batchnorm.nn.explain(norm, inputs.x).implementation
    return timed_first_call(runner) if peer == COMPILE else runner


def norm_layer(kind: Any, case: Case, inputs: Inputs, **options: Any) -> nn.Module:
    """``BatchNorm1d``, ``2d`` or ``3d`` of a module of layers, with the parameters of the case."""
    dimensions = max(len(case.shape) - 2, 1)
    cls = getattr(kind, f"BatchNorm{dimensions}d")
    norm = cls(case.shape[1], eps=EPS, momentum=MOMENTUM, dtype=inputs.x.dtype, **options)
    state = inputs._asdict()
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(state[name])
    return norm


def ours(case: Case, inputs: Inputs) -> tuple[nn.Module, Layer]:
    norm = norm_layer(batchnorm.nn, case, inputs, activation=case.activation)
    return norm, norm


def torch_eager(case: Case, inputs: Inputs) -> tuple[nn.Module, Layer]:
    """``activation(norm(x) + residual)``, each a call of its own."""
    norm = norm_layer(nn, case, inputs)
    if case.activation is not None and not case.residual:
        act = ACTIVATIONS[case.activation]
        return norm, lambda x: act(norm(x))
    if case.residual:
        return norm, lambda x, residual: activate(norm(x), residual, case.activation)
    return norm, norm


def torch_inplace(case: Case, inputs: Inputs) -> tuple[nn.Module, Layer]:
    """``relu_(norm(x).add_(residual))``, as torchvision writes its networks."""
    norm = norm_layer(nn, case, inputs)
    act = IN_PLACE[case.activation]
    if case.residual:
        return norm, lambda x, residual: act(norm(x).add_(residual))
    return norm, lambda x: act(norm(x))


def torch_compile(case: Case, inputs: Inputs) -> tuple[nn.Module, Layer]:
    """``torch.compile`` of the eager form for exactly these shapes."""
    torch.compiler.reset()
    norm, eager = torch_eager(case, inputs)
    return norm, torch.compile(eager, dynamic=False)


LAYERS: dict[str, Callable[[Case, Inputs], tuple[nn.Module, Layer]]] = {
    OURS: ours,
    TORCH: torch_eager,
    INPLACE: torch_inplace,
    COMPILE: torch_compile,
}


def run_torch(layer: Layer, norm: nn.Module, pass_: str, inputs: Inputs) -> Runner:
    """A runner of anything that takes and returns tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.residual) if tensor is not None]
    wanted = [leaves[0], *norm.parameters(), *leaves[1:]]

    def forward() -> Sequence[Tensor]:
        return [layer(*leaves)]

    def forward_and_backward() -> Sequence[Tensor]:
        output = layer(*leaves)
        return [output, *torch.autograd.grad(output, wanted, inputs.grad_output)]

    def evaluate() -> Sequence[Tensor]:
        with torch.no_grad():
            return [layer(*leaves)]

    norm.train(pass_ != EVALUATION)
    call = {BOTH: forward_and_backward, EVALUATION: evaluate}.get(pass_, forward)
    running = [buffer for name, buffer in norm.named_buffers() if name.startswith("running")]
    return Runner(call, lambda results: [result.detach() for result in results], lambda: running)


def timed_first_call(runner: Runner) -> Runner:
    """Compile now, and forget what the call did to the running statistics."""
    before = [tensor.clone() for tensor in runner.statistics()]
    start = time.perf_counter()
    runner.call()
    runner.notes["compile_seconds"] = round(time.perf_counter() - start, 3)
    for now, then in zip(runner.statistics(), before, strict=True):
        now.copy_(then)
    return runner
