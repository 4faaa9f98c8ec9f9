"""The layers: drop-in for those of torch.nn, fused with what follows them; BN's relatives; whitening."""

from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, explain
from batchnorm.nn.conditional import ConditionalBatchNorm1d, ConditionalBatchNorm2d, ConditionalBatchNorm3d
from batchnorm.nn.domain import DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d
from batchnorm.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from batchnorm.nn.masked import MaskedBatchNorm1d
from batchnorm.nn.per_activation import PerActivationBatchNorm
from batchnorm.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from batchnorm.nn.whitening import Whitening1d, Whitening2d, Whitening3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "MaskedBatchNorm1d",
    "PerActivationBatchNorm",
    "Whitening1d",
    "Whitening2d",
    "Whitening3d",
    "explain",
]
