"""MaskedBatchNorm1d."""

import torch
from torch import Tensor

from batchnorm._ops.checks import check_input
from batchnorm.nn.batchnorm import BatchNorm1d, traced


class MaskedBatchNorm1d(BatchNorm1d):
    r"""Batch normalization of padded sequences: only the values under the mask are data.

    .. math:: y_i = \mathrm{act}\Big(\gamma \frac{x_i - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} + \beta
        + \mathrm{residual}_i\Big) \text{ where } M_i, \text{ else } 0, \quad m = \sum_i M_i

    Training: mean and variance are those of the m valid values per channel; running statistics move towards them, the
    variance multiplied by m / (m - 1). Evaluation: the running statistics normalize. Frozen: as
    :class:`BatchNorm1d`. In all of them the output is 0 where the mask is False, whatever stands there (NaN too),
    and no gradient goes there. A mask without a valid value is an empty batch: the output is 0 and nothing changes.
    Without a mask everything is valid. Under torch.compile a masked call breaks the graph: the number of valid values
    depends on the data.

    Args:
        num_features: C. All arguments are those of :class:`BatchNorm1d`.

    Shape:
        input and residual (N, C, L) with mask (N, L), or (N, C) with mask (N,); output as the input. The mask is
        boolean, True where a value is valid.

    Raises:
        ValueError: one valid value per channel when training; a mask that is not boolean or of another shape or
            device; as :class:`BatchNorm1d`.
        RuntimeError: as :class:`BatchNorm1d`.

    Same as torch.nn: constructor, parameters, buffers and state_dict (both ways).

    Source:
        Ioffe & Szegedy 2015, Algorithm 1, over the valid values alone. Keras and flax take masks as well.

    Example:
        >>> layer = MaskedBatchNorm1d(1)
        >>> x = torch.tensor([[[1.0, 3.0, 99.0]], [[5.0, 99.0, 99.0]]])
        >>> lengths = torch.tensor([2, 1])
        >>> layer(x, mask=torch.arange(3) < lengths[:, None]).detach()
        tensor([[[-1.2247,  0.0000,  0.0000]],
                [[ 1.2247,  0.0000,  0.0000]]])
        >>> layer.running_mean
        tensor([0.3000])
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Normalize the valid values of ``input``, add those of ``residual``, apply the activation."""
        if mask is None:
            return super().forward(input, residual)
        if not isinstance(input, Tensor):
            return traced(self, input, residual, mask=mask)
        check_input(input, residual, self.activation)
        packed = self.valid_values(input, mask=mask)
        if self.normalizes_by_batch and packed.shape[2] == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got a mask with 1 valid position of "
                f"{mask.numel()}"
            )
        rest = None if residual is None else self.valid_values(residual, mask=mask)
        valid = super().forward(packed, rest)
        output = valid.new_zeros(input.transpose(0, 1).shape)
        output[:, mask] = valid[0]
        return output.transpose(0, 1).contiguous()

    def valid_values(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """What the statistics of a forward with these arguments are computed from: (1, C, m) under a mask."""
        if mask is None:
            return input
        self._check_input_dim(input)
        expected = (len(input), *input.shape[2:])
        if mask.dtype != torch.bool or mask.shape != expected or mask.device != input.device:
            raise ValueError(
                f"mask should be torch.bool of shape {expected} on {input.device}, True where a value is valid: "
                f"got {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
            )
        return input.transpose(0, 1)[:, mask].unsqueeze(0)
