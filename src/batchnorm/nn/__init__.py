"""The layers: drop-in for those of torch.nn, fused with the residual and the activation that follow them; whitening."""

from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, explain
from batchnorm.nn.whitening import Whitening1d, Whitening2d, Whitening3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Whitening1d", "Whitening2d", "Whitening3d", "explain"]
