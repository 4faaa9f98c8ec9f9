"""Folding by torch's own tools, where it fails or is silently wrong, next to ours."""

import copy

import pytest
import torch
from folded import with_statistics
from torch import Tensor, nn
from torch.ao.nn.intrinsic import qat
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import batchnorm


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def assert_ours_is_right(model: nn.Module, x: Tensor) -> None:
    folded, changes = batchnorm.fold(model, x)
    assert any(change.what.startswith("folded into") for change in changes)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_torch_cannot_fold_into_a_transposed_convolution_with_groups():
    conv, norm = with_statistics(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    with pytest.raises(RuntimeError, match=r"The size of tensor a \(3\) must match the size of tensor b \(6\)"):
        fuse_conv_bn_eval(conv, norm, transpose=True)
    assert_ours_is_right(nn.Sequential(conv, norm).eval(), torch.randn(2, 4, 5, 5))


def test_torch_folds_a_transposed_convolution_along_the_wrong_axis_unless_told():
    conv, norm = with_statistics(nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)))
    model, x = nn.Sequential(conv, norm).eval(), torch.randn(2, 4, 5, 5)
    assert largest_difference(fuse_conv_bn_eval(conv, norm)(x), model(x)) > 0.1
    assert_ours_is_right(model, x)


def test_torch_cannot_fold_a_layer_without_gamma_into_a_linear_layer():
    linear, norm = with_statistics(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)))
    with pytest.raises(TypeError, match="unsupported operand"):
        fuse_linear_bn_eval(linear, norm)
    assert_ours_is_right(nn.Sequential(linear, norm).eval(), torch.randn(5, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torch_folds_a_linear_layer_over_sequences_along_the_wrong_axis():
    from torch.fx.experimental.optimization import fuse

    model = with_statistics(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    # as many positions as features, so that the layer runs: it normalizes positions
    x = torch.randn(5, 4, 3)
    assert largest_difference(fuse(model)(x), model(x)) > 0.1
    folded, changes = batchnorm.fold(model, x)
    assert "it normalizes another axis than the features of '0'" in changes[0].reason
    assert torch.equal(folded(x), model(x))


def test_torch_folds_a_negative_variance_to_nan():
    conv, norm = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    norm.running_var[1] = -0.5
    assert fuse_conv_bn_eval(conv, norm).weight.isnan().any()
    folded, changes = batchnorm.fold(nn.Sequential(conv, norm).eval())
    assert changes[0].reason == "its running_var is negative in 1 of 4 channels, down to -0.5"
    assert not folded[0].weight.isnan().any()


def test_torch_folds_statistics_that_were_never_updated():
    conv, norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    fused = fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(fused.weight, conv.weight, rtol=1e-4, atol=0)
    _, changes = batchnorm.fold(nn.Sequential(conv, norm).eval())
    assert changes[0].reason == "its statistics were never updated: mean 0 and variance 1 are the initial ones"


class Registered(nn.Module):
    """The layer is registered right behind the convolution, and called behind the relu."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.relu(self.conv(x)))


def folded_in_the_order_of_registration(model: nn.Module) -> nn.Module:
    """As many scripts do it: whatever layer stands behind a convolution in the list of modules."""
    result, last = copy.deepcopy(model), ("", None)
    for name, module in list(result.named_children()):
        if isinstance(module, nn.BatchNorm2d) and isinstance(last[1], nn.Conv2d):
            setattr(result, last[0], fuse_conv_bn_eval(last[1], module))
            setattr(result, name, nn.Identity())
        last = (name, module)
    return result


def test_order_of_registration_folds_across_a_relu():
    model, x = with_statistics(Registered()), torch.randn(2, 3, 5, 5)
    assert largest_difference(folded_in_the_order_of_registration(model)(x), model(x)) > 0.1
    folded, changes = batchnorm.fold(model, x)
    assert changes[0].reason == "ReLU 'relu' precedes; its output is that of the model or block"
    assert torch.equal(folded(x), model(x))


def through_quantization_aware_training(model: nn.Module, x: Tensor) -> Tensor:
    qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    layer = qat.ConvBn2d(3, 4, 3, bias=True, qconfig=qconfig)
    conv, norm = (module.state_dict() for module in model)
    layer.load_state_dict(conv | {f"bn.{key}": value for key, value in norm.items()}, strict=False)
    return layer.eval()(x)


def test_quantization_aware_training_divides_by_a_gamma_of_zero():
    model, x = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 5, 5)
    assert through_quantization_aware_training(model, x).isfinite().all()
    nn.init.zeros_(model[1].weight)
    assert through_quantization_aware_training(model, x).isnan().any()
    assert_ours_is_right(model, x)
