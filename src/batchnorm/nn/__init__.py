"""The layers: drop-in for those of torch.nn, fused with the residual and the activation that follow them."""

from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, explain

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "explain"]
