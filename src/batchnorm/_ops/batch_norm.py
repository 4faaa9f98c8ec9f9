"""The training operator and its backward: schema, fake, autograd and double backward.

``batchnorm::batch_norm_train`` is functional: it returns output, batch mean and batch variance and writes nothing.
Who updates which running statistics is decided in Python, by the caller.

Two ways lead to the same kernels. Eager calls go through :class:`BatchNormTrain`, whose ``forward`` takes ``ctx``:
half the Python of the other form (15 us against 30 us for a 60 x 100 input). torch.compile and torch.export see the
registered operator. torch.func and forward-mode AD can use neither: inside them "auto" takes the plain reference.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from batchnorm._ops import aten, kernel, plain
from batchnorm._ops.double_backward import differentiable_gradients
from batchnorm._ops.dtypes import as_dtype, dense_format, statistics_dtype
from batchnorm.errors import ImplementationError

lib = torch.library.Library("batchnorm", "DEF")

TRAIN = (
    "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str? activation, "
    "str implementation) -> (Tensor output, Tensor mean, Tensor var, Tensor saved)"
)
# grad_residual is empty where the residual's gradient is grad_output itself: an operator may not return its input.
TRAIN_BACKWARD = (
    "batch_norm_train_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor saved, float eps, str? activation, str implementation) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)"
)
lib.define(TRAIN, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
lib.define(TRAIN_BACKWARD, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))

train_op = torch.ops.batchnorm.batch_norm_train.default
train_backward_op = torch.ops.batchnorm.batch_norm_train_backward.default

IMPLEMENTATIONS: dict[str, ModuleType] = {"kernel": kernel, "aten": aten, "reference": plain}


def implementation_named(name: str) -> ModuleType:
    if name not in IMPLEMENTATIONS:
        raise ImplementationError(
            f"no implementation {name!r} of the operator: expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[name]


def train_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation_named(implementation).train_forward(input, weight, bias, residual, eps, activation)


def train_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    eps: float,
    activation: str | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *grads, grad_z = implementation_named(implementation).train_backward(
        grad_output, input, weight, bias, residual, saved, eps, activation
    )
    apart = residual is not None and activation is not None
    return *grads, grad_z if apart else grad_output.new_empty(0)


def train_fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = input.new_empty(input.shape[1], dtype=statistics_dtype(input))
    saved = input.new_empty((2, input.shape[1]), dtype=torch.float64)
    return torch.empty_like(input), mean, torch.empty_like(mean), saved


def train_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    eps: float,
    activation: str | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    apart = residual is not None and activation is not None
    grad_residual = torch.empty_like(input) if apart else input.new_empty(0)
    grad_weight = input.new_empty(input.shape[1], dtype=statistics_dtype(input))
    return torch.empty_like(input), grad_weight, torch.empty_like(grad_weight), grad_residual


lib.impl("batch_norm_train", train_forward, "CompositeExplicitAutograd")
lib.impl("batch_norm_train_backward", train_backward, "CompositeExplicitAutograd")
torch.library.register_fake("batchnorm::batch_norm_train", train_fake, lib=lib)
torch.library.register_fake("batchnorm::batch_norm_train_backward", train_backward_fake, lib=lib)


def setup_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Keep the input and the statistics, and the residual only where an activation must be differentiated again."""
    input, weight, bias, residual, eps, activation, implementation = inputs
    _, mean, var, saved = output
    ctx.mark_non_differentiable(mean, var, saved)
    ctx.set_materialize_grads(False)
    ctx.options = (eps, activation, implementation)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(input, weight, bias, None if activation is None else residual, saved)


def backward_of_train(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 7
    input, weight, bias, residual, saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        eps, activation, _ = ctx.options
        *grads, grad_sum = differentiable_gradients(
            grad_output, input, weight, bias, residual, eps, activation, ctx.needs_input_grad[:3]
        )
        return *grads, grad_sum if ctx.has_residual else None, None, None, None
    if grad_output.stride() != input.stride():
        grad_output = grad_output.contiguous(memory_format=dense_format(input) or torch.contiguous_format)
    with torch._C._AutoDispatchBelowAutograd():
        grad_input, grad_weight, grad_bias, grad_residual = train_backward_op(
            grad_output, input, weight, bias, residual, saved, *ctx.options
        )
    if not ctx.has_residual:
        grad_residual = None
    elif residual is None:
        grad_residual = grad_output
    return (
        grad_input,
        None if weight is None else as_dtype(grad_weight, weight.dtype),
        None if bias is None else as_dtype(grad_bias, bias.dtype),
        grad_residual,
        None,
        None,
        None,
    )


class BatchNormTrain(torch.autograd.Function):
    """The eager way into ``batch_norm_train``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch._C._AutoDispatchBelowAutograd():
            output = train_op(*inputs)
        setup_train(ctx, inputs, output)
        return output

    backward = staticmethod(backward_of_train)  # pyright: ignore[reportAssignmentType]


torch.library.register_autograd("batchnorm::batch_norm_train", backward_of_train, setup_context=setup_train, lib=lib)


def train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, batch mean and batch variance, by the way that suits the caller."""
    if implementation == "aten" and activation is None and residual is None and input.numel() and not seen_through():
        return aten.train_natively(input, weight, bias, eps)[:3]
    layout = dense_format(input)
    if layout is None:
        layout = torch.contiguous_format
        input = input.contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    if in_transform():
        raise ImplementationError(
            f"implementation={implementation!r} cannot run inside torch.func transforms or forward-mode AD; "
            "implementation='auto' can"
        )
    call: Callable[..., Any] = train_op if seen_through() else BatchNormTrain.apply
    output, mean, var, _ = call(input, weight, bias, residual, eps, activation, implementation)
    return output, mean, var


def in_transform() -> bool:
    """Whether torch.func or forward-mode AD is active; an operator of ours has no rules for them."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def seen_through() -> bool:
    """Whether something records or transforms the operations of this call instead of just running them."""
    return torch.compiler.is_compiling() or in_transform() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
