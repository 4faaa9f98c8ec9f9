"""``assert_unchanged``: an error that names every frozen tensor of the BN layers that moved."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from batchnorm.errors import ChangedError
from batchnorm.statistics.freeze import affine_holders
from batchnorm.statistics.layers import normalizing_layers


@contextmanager
def assert_unchanged(model: nn.Module, pattern: str | Iterable[str] = "*") -> Iterator[None]:
    """Raise if running statistics, counters, or parameters without gradient of BN layers change inside of ``with``.

    Bits are compared; NaN is equal to NaN. Also a function decorator. The tensors of the layers are held twice
    meanwhile, as many values as there are channels, and nothing is done to the layers.

    Args:
        model: holds BN layers, frozen by :func:`freeze` or in whatever way.
        pattern: which of them, as in :func:`freeze`.

    Raises:
        ChangedError: it names every tensor that changed, and by how much; and every layer frozen by :func:`freeze`
            that is in training mode. Not if the body itself raises.
        ValueError: no layer matches.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).requires_grad_(False)
        >>> with assert_unchanged(model):
        ...     _ = model(torch.tensor([[1.0], [3.0]]))
        Traceback (most recent call last):
        batchnorm.errors.ChangedError: batch normalization changed:
          0.running_mean: 1 of 1 values, by up to 0.2
          0.running_var: 1 of 1 values, by up to 0.1
          0.num_batches_tracked: 1 of 1 values, by up to 1
    """
    names = list(normalizing_layers(model, pattern))
    before = {key: tensor.detach().clone() for key, tensor in tensors_to_watch(model, names).items()}
    yield
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    changes = {key: difference(then, now.get(key)) for key, then in before.items()}
    found = [f"  {key}: {change}" for key, change in changes.items() if change]
    awake = [name for name, module in model.named_modules() if name in names and is_awake(module)]
    found += [f"  {dotted(name)}training: True, although the layer is frozen" for name in awake]
    if found:
        raise ChangedError("\n".join(["batch normalization changed:", *found]))


def tensors_to_watch(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Buffers, and parameters without gradient, by their names in the model."""
    paths = {id(module): name for name, module in model.named_modules()}
    holders = affine_holders(model)
    watched: dict[str, Tensor] = {}
    for name in names:
        layer = model.get_submodule(name)
        watched |= {dotted(name) + key: buffer for key, buffer in layer.named_buffers()}
        holder = holders.get(id(layer), layer)
        parameters = holder.named_parameters(prefix=paths[id(holder)])
        watched |= {key: parameter for key, parameter in parameters if not parameter.requires_grad}
    return watched


def dotted(name: str) -> str:
    return f"{name}." if name else ""


def is_awake(layer: nn.Module) -> bool:
    return layer.training and getattr(layer, "frozen_statistics", False)


def difference(then: Tensor, now: Tensor | None) -> str:
    """How a tensor changed; "" if it did not."""
    if now is None:
        return "is gone"
    if (now.shape, now.dtype) != (then.shape, then.dtype):
        return f"was {then.dtype} of shape {tuple(then.shape)}, is {now.dtype} of shape {tuple(now.shape)}"
    now = now.detach().to(then.device)
    moved = (now != then) & ~(now.isnan() & then.isnan())
    count = int(moved.sum())
    if not count:
        return ""
    change = (now.double() - then.double())[moved].abs()
    broken = int((~now[moved].isfinite()).sum())
    finite = change[change.isfinite()]
    largest = [f"by up to {finite.max().item():.3g}"] if len(finite) else []
    to_nan = [f"{broken} of them to inf or NaN"] if broken else []
    return ", ".join([f"{count} of {then.numel()} values", *largest, *to_nan])
