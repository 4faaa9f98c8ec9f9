"""Tensors of one shape in every memory layout that a layer may meet."""

from collections.abc import Callable

import torch
from torch import Tensor


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()])


def strided(x: Tensor) -> Tensor:
    """Every second element of a larger tensor."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


def transposed(x: Tensor) -> Tensor:
    """Batch and channel swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def expanded(x: Tensor) -> Tensor:
    """One sample repeated along the batch by a stride of 0."""
    return x[:1].expand_as(x)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "dense": ((5, 3), contiguous),
    "dense_transposed": ((5, 3), transposed),
    "sequence": ((4, 3, 5), contiguous),
    "sequence_strided": ((4, 3, 5), strided),
    "image": ((3, 4, 3, 5), contiguous),
    "image_channels_last": ((3, 4, 3, 5), channels_last),
    "image_strided": ((3, 4, 3, 5), strided),
    "image_transposed": ((3, 4, 3, 5), transposed),
    "image_expanded": ((3, 4, 3, 5), expanded),
    "one_channel": ((3, 1, 3, 5), contiguous),
    "volume": ((2, 3, 2, 3, 2), contiguous),
    "volume_channels_last": ((2, 3, 2, 3, 2), channels_last),
}
DENSE_LAYOUTS = ("dense", "sequence", "image", "image_channels_last", "one_channel", "volume", "volume_channels_last")


def tensor_in(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random tensor in the named layout."""
    shape, arrange = LAYOUTS[layout]
    return arrange(torch.randn(shape, dtype=dtype))
