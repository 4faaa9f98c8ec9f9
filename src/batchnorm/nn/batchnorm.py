"""BatchNorm1d, BatchNorm2d, BatchNorm3d, and ``explain``."""

from typing import Any, Protocol

import torch
from torch import Tensor

from batchnorm._ops.checks import check_activation
from batchnorm._ops.choice import Choice, check_implementation, choose
from batchnorm._ops.dtypes import statistics_dtype
from batchnorm.functional import evaluate, train_and_track

MIXED = Choice("reference", "a mix of batch and running statistics is computed by plain operations")
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Recorder(Protocol):
    """Runs the training forward of a layer in its place, where its running statistics must not move."""

    def __call__(
        self,
        layer: "FusedBatchNorm",
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        choice: Choice,
    ) -> Tensor:
        """Normalize by ``layer.train_and_track`` with other buffers than the layer's."""
        ...


class FusedBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the three layers share: everything but the check of the number of dimensions."""

    # defaults for a torch layer whose __class__ is set to ours
    activation: str | None = None
    implementation: str = "auto"
    last_choice: Choice | None = None
    recorder: Recorder | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        implementation: str = "auto",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.activation = None if activation is None else check_activation(activation)
        self.implementation = check_implementation(implementation)
        self.last_choice = None

    @property
    def normalizes_by_batch(self) -> bool:
        """Whether a forward uses the statistics of its batch: in training, and where no running ones exist."""
        return self.training or (self.running_mean is None and self.running_var is None)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize ``input``, add ``residual`` of the same shape, apply the activation."""
        if not isinstance(input, Tensor):
            return traced(self, input, residual)
        self._check_input_dim(input)
        activation = self.activation
        weight, bias, running_mean, running_var, num_batches_tracked = self.tensors()
        training = self.training
        by_batch = training or (running_mean is None and running_var is None)
        choice = choose(
            self.implementation, input, by_batch, residual, activation, weight, bias, running_mean, running_var
        )
        if choice is not self.last_choice and not torch.compiler.is_compiling():
            self.last_choice = choice
        if not by_batch:
            return evaluate(input, running_mean, running_var, weight, bias, residual, activation, self.eps, choice)
        if training and self.recorder is not None:
            return self.recorder(self, input, weight, bias, residual, choice)
        momentum: float | Tensor | None = self.momentum
        if not training or not self.track_running_stats:
            running_mean = running_var = None
        if running_mean is None:
            momentum, num_batches_tracked = 0.0, None
        elif momentum is None:
            momentum = self.cumulative_momentum()
        return self.train_and_track(
            input, weight, bias, residual, running_mean, running_var, momentum, num_batches_tracked, choice
        )

    def train_and_track(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        num_batches_tracked: Tensor | None,
        choice: Choice,
    ) -> Tensor:
        """What a forward does where it normalizes by its batch; None stands for what is not tracked."""
        return train_and_track(
            input,
            weight,
            bias,
            residual,
            self.eps,
            self.activation,
            running_mean,
            running_var,
            momentum,
            num_batches_tracked,
            choice,
        )

    def tensors(self) -> list[Tensor | None]:
        """Weight, bias and the three buffers; not by ``self.weight``, which takes 0.5 us each."""
        parameters, buffers = self._parameters, self._buffers
        try:
            return [
                parameters["weight"],
                parameters["bias"],
                buffers["running_mean"],
                buffers["running_var"],
                buffers["num_batches_tracked"],
            ]
        except KeyError:
            # parametrized, or replaced by something else
            return [getattr(self, name) for name in STATE]

    def cumulative_momentum(self) -> Tensor | float:
        """The weight that makes the running statistics the average over all batches, this one included."""
        if self.num_batches_tracked is None or self.running_mean is None:
            return 0.0
        return 1.0 / (self.num_batches_tracked + 1).to(statistics_dtype(self.running_mean))

    def extra_repr(self) -> str:
        served = "" if self.last_choice is None else f" (last call: {self.last_choice.implementation})"
        mode = "training" if self.training else "evaluation"
        return (
            f"{super().extra_repr()}, activation={self.activation}, mode={mode}, "
            f"implementation={self.implementation}{served}"
        )


class BatchNorm1d(FusedBatchNorm, torch.nn.BatchNorm1d):
    r"""Batch normalization of (N, C) or (N, C, L), fused with a residual and an activation.

    .. math:: y = \mathrm{act}\Big(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \mathrm{residual}\Big)

    Training: the mean and the variance (divided by m) of the mini-batch normalize it; running statistics move towards
    the batch mean and the unbiased variance. Evaluation: the running statistics normalize. Frozen, that is
    ``eval()`` and ``requires_grad_(False)``: as evaluation, with a gradient for the input alone.

    Args:
        num_features: C.
        eps: added to the variance; positive.
        momentum: weight of the *new* batch in the running statistics; None for the cumulative average.
        affine: learn gamma (``weight``) and beta (``bias``).
        track_running_stats: keep running statistics. Without them, evaluation normalizes by the batch too.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: learn beta; only with ``affine``.
        activation: what follows the normalization: None, "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "mish",
            "sigmoid", "tanh" or "hardswish", with torch's default parameters.
        implementation: "auto", "kernel", "aten" or "reference". A named one never falls back to another.

    Shape:
        input and residual (N, C) or (N, C, L); output the same.

    Raises:
        ValueError: another number of dimensions; one value per channel when training; ``eps`` not positive.
        RuntimeError: C, dtype or device differ from the layer's.

    Same as torch.nn: constructor, parameters, buffers and state_dict (both ways), errors, ``isinstance`` tests.

    Differs from torch.nn in:

    - a forward that fails, and an empty batch, leave ``num_batches_tracked`` as it was;
    - ``momentum=None`` compiles without a graph break;
    - ``momentum=0.0`` keeps the running statistics even if the batch holds inf or NaN;
    - running statistics in half precision are updated in float32 before they are rounded;
    - outputs of 8 MiB and more lie in memory that is used again, and cannot be resized in place;
    - ``torch.jit.script`` is not supported (``torch.jit.trace``, ``torch.export`` and ``torch.compile`` are);
    - ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` and ``torch.nn.utils.fusion`` know nothing of ``activation`` and
      ``residual``, and ``torch.ao.quantization.fuse_modules`` only of torch's own classes.

    Source:
        Ioffe & Szegedy 2015, Algorithm 1; section 3.2 for the convolutional form.

    Example:
        >>> import torch
        >>> layer = BatchNorm1d(2, activation="relu")
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach()
        tensor([[0.0000, 0.0000],
                [1.0000, 1.0000]])
        >>> layer.running_mean, layer.running_var
        (tensor([0.2000, 2.0000]), tensor([ 1.1000, 20.9000]))
    """


class BatchNorm2d(FusedBatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W): one gamma and one beta per feature map. See :class:`BatchNorm1d`.

    Statistics run over batch and positions, m = N x H x W values per channel (section 3.2 of the paper).

    Example:
        >>> import torch
        >>> block = BatchNorm2d(8, activation="relu")
        >>> x, shortcut = torch.randn(4, 8, 5, 5), torch.randn(4, 8, 5, 5)
        >>> block(x, residual=shortcut).shape
        torch.Size([4, 8, 5, 5])
    """


class BatchNorm3d(FusedBatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W). See :class:`BatchNorm1d`.

    Example:
        >>> import torch
        >>> BatchNorm3d(2)(torch.randn(3, 2, 4, 4, 4)).shape
        torch.Size([3, 2, 4, 4, 4])
    """


def traced(layer: torch.nn.Module, input: Any, residual: Any = None, **named: Any) -> Any:
    """One ``call_module`` node in a graph of torch.fx, as torch.nn's layers are."""
    if not isinstance(input, torch.fx.Proxy):
        raise TypeError(f"input must be Tensor, not {type(input).__name__}")
    tracer = input.tracer
    arguments = (input,) if residual is None else (input, residual)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, named)  # pyright: ignore[reportAttributeAccessIssue]


def explain(layer: torch.nn.Module, input: Tensor) -> Choice:
    """Say which implementation would serve ``layer(input)`` here and now, and why, without running it.

    Args:
        layer: a layer of ``batchnorm.nn``, in the mode that is asked about.
        input: an input it accepts.

    Returns:
        ``(implementation, reason)``.

    Raises:
        TypeError: the layer is not one of ``batchnorm.nn``, or holds the one that normalizes.
        ValueError: the input has the wrong number of dimensions for the layer.

    Example:
        >>> import torch
        >>> explain(BatchNorm1d(2), torch.randn(3, 2))
        Choice(implementation='kernel', reason='one pass over the input, compiled for this processor')
    """
    if not isinstance(layer, FusedBatchNorm):
        got = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise TypeError(f"expected a normalizing layer of batchnorm.nn, got {got}")
    layer._check_input_dim(input)
    chosen = vars(layer).get("normalizes_by")
    if isinstance(chosen, float):
        return MIXED
    by_batch = layer.normalizes_by_batch if chosen is None else chosen == "batch"
    return choose(layer.implementation, input, training=by_batch)
