"""Every form of a linear map, with the layer before and after it, against the unfolded model in float64."""

from typing import Any

import pytest
import torch
from folded import assert_same_evaluation, fold_and_compare, reason, whats, with_statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm.surgery.folding import growth_and_spread

CONVOLUTIONS: list[type[nn.Module]] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED: list[type[nn.Module]] = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
searched = settings(max_examples=60, deadline=None)


def spatial(conv: type[nn.Module]) -> int:
    return int(conv.__name__[-2])


def norm_for(conv: type[nn.Module], channels: int, **kwargs: Any) -> nn.Module:
    return NORMS[spatial(conv) - 1](channels, **kwargs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("conv", CONVOLUTIONS + TRANSPOSED)
def test_layer_after_a_convolution_is_folded(conv, groups, affine, bias):
    model = with_statistics(
        nn.Sequential(conv(4, 8, 3, padding=1, groups=groups, bias=bias), norm_for(conv, 8, affine=affine))
    )
    folded, changes = fold_and_compare(model, torch.randn(3, 4, *[5] * spatial(conv)))
    assert whats(changes) == {"1": "folded into 0"}
    assert type(folded[1]) is nn.Identity
    assert type(folded[0]) is conv
    assert changes[0].error < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_layer_before_a_convolution_is_folded(conv, groups, affine, bias):
    model = with_statistics(nn.Sequential(norm_for(conv, 4, affine=affine), conv(4, 8, 3, groups=groups, bias=bias)))
    folded, changes = fold_and_compare(model, torch.randn(3, 4, *[5] * spatial(conv)))
    assert whats(changes) == {"0": "folded into 1"}
    assert type(folded[0]) is nn.Identity
    assert folded[1].bias is not None


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_linear_layer_of_samples_is_folded(order, affine, bias):
    linear, norm = nn.Linear(3, 5, bias=bias), nn.BatchNorm1d(5 if order == "after" else 3, affine=affine)
    model = with_statistics(nn.Sequential(*([linear, norm] if order == "after" else [norm, linear])))
    _, changes = fold_and_compare(model, torch.randn(6, 3))
    assert [change.what for change in changes] == [f"folded into {0 if order == 'after' else 1}"]


@pytest.mark.parametrize(
    "layers", [lambda: [nn.Linear(4, 5), nn.BatchNorm1d(5)], lambda: [nn.BatchNorm1d(5), nn.Linear(4, 5)]]
)
def test_linear_layer_of_sequences_is_left_alone(layers):
    model = with_statistics(nn.Sequential(*layers()))
    assert "another axis than the features" in reason(model, torch.randn(3, 5, 4))


def test_linear_layer_without_an_example_is_left_alone():
    model = with_statistics(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    _, changes = batchnorm.fold(model)
    assert changes[0].reason == "an example is needed: it normalizes the features of '0' only if its input is (N, C)"


def test_one_convolution_takes_up_a_layer_on_each_side():
    model = with_statistics(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    folded, changes = fold_and_compare(model, torch.randn(3, 4, 5, 5))
    assert whats(changes) == {"0": "folded into 1", "2": "folded into 1"}
    assert changes[0].error == changes[1].error
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_layer_between_two_convolutions_goes_into_the_first():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)))
    folded, changes = fold_and_compare(model, torch.randn(2, 3, 6, 6))
    assert whats(changes) == {"1": "folded into 0"}
    assert torch.equal(folded[2].weight, model[2].weight)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_padding_with_values_of_the_channel_commutes_with_a_shift(conv, mode):
    model = with_statistics(nn.Sequential(norm_for(conv, 4), conv(4, 6, 3, padding=2, padding_mode=mode)))
    _, changes = fold_and_compare(model, torch.randn(2, 4, *[4] * spatial(conv)))
    assert whats(changes) == {"0": "folded into 1"}


@pytest.mark.parametrize("padding", [1, (0, 1), "same"])
def test_padding_with_zeros_keeps_a_shift_out(padding):
    model = with_statistics(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=padding)))
    assert reason(model, torch.randn(2, 4, 5, 5)) == "'1' pads with zeros, which its shift does not reach"


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, bias=False)])
def test_without_a_shift_padding_does_not_matter(conv):
    model = with_statistics(nn.Sequential(nn.BatchNorm2d(4), conv))
    model[0].running_mean.zero_()
    nn.init.zeros_(model[0].bias)
    folded, changes = fold_and_compare(model, torch.randn(2, 4, 5, 5))
    assert whats(changes) == {"0": "folded into 1"}
    assert (folded[1].bias is None) == (conv.bias is None)


def test_transposed_convolution_keeps_a_shift_before_it_out():
    model = with_statistics(nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3)))
    assert "through another part of the kernel" in reason(model, torch.randn(2, 4, 5, 5))


@st.composite
def forms(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A convolution of any options with a layer before, after, or both."""
    conv = draw(st.sampled_from(CONVOLUTIONS + TRANSPOSED))
    transposed, n = conv in TRANSPOSED, spatial(conv)
    per_axis = lambda *values: draw(st.tuples(*[st.sampled_from(values)] * n))  # noqa: E731
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = (groups * draw(st.sampled_from([1, 2, 3])) for _ in range(2))
    stride, dilation, kernel = per_axis(1, 2, 3), per_axis(1, 2), per_axis(1, 2, 3)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    before = not transposed and draw(st.booleans())
    if transposed:
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    elif draw(st.booleans()):
        modes = ["reflect", "replicate", "circular", *([] if before else ["zeros"])]
        options |= {"padding": per_axis(0, 1, 2), "padding_mode": draw(st.sampled_from(modes))}
    layers = [conv(inputs, outputs, kernel, **options)]
    if before:
        layers.insert(0, norm_for(conv, inputs))
    if not before or draw(st.booleans()):
        layers.append(norm_for(conv, outputs, affine=draw(st.booleans())))
    return with_statistics(nn.Sequential(*layers)), torch.randn(2, inputs, *[7] * n)


@given(forms())
@searched
def test_every_form_is_exact(form):
    model, x = form
    folded, changes = batchnorm.fold(model)
    assert all(change.what.startswith("folded into") for change in changes)
    assert_same_evaluation(model, folded, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_stays_and_values_are_rounded_once(dtype):
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    folded, changes = batchnorm.fold(model, torch.randn(2, 3, 5, 5, dtype=dtype))
    scale = model[1].weight.double() / (model[1].running_var.double() + model[1].eps).sqrt()
    exact = model[0].weight.double() * scale.view(-1, 1, 1, 1)
    assert torch.equal(folded[0].weight, exact.to(dtype))
    assert changes[0].error < 16 * torch.finfo(dtype).eps


def test_half_precision_convolution_with_float32_layer_is_folded():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3).bfloat16(), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 5, 5, dtype=torch.bfloat16)
    folded, changes = batchnorm.fold(model, x)
    assert whats(changes) == {"1": "folded into 0"}
    assert folded(x).dtype == model(x).dtype == torch.bfloat16
    assert folded[0].bias.dtype == torch.bfloat16


def test_gamma_of_zero_is_exact():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    nn.init.zeros_(model[1].weight)
    folded, changes = fold_and_compare(model, torch.randn(2, 3, 5, 5))
    assert not folded[0].weight.any()
    assert torch.equal(folded[0].bias, model[1].bias)
    assert (changes[0].error, changes[0].growth) == (0.0, None)


def test_growth_reports_weights_that_explode():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    for tensor, value in ((model[0].weight, 1.0), (model[1].weight, 1.0), (model[1].running_var, 1 - 1e-5)):
        nn.init.constant_(tensor, value)
    model[1].running_var[2] = 0
    _, changes = fold_and_compare(model, torch.randn(2, 3, 5, 5))
    # 1 / sqrt(1e-5)
    assert changes[0].growth == pytest.approx(316.2, rel=1e-3)
    assert changes[0].spread == pytest.approx(316.2, rel=1e-3)


def test_ranges_are_those_of_output_channels():
    weight = torch.ones(4, 3, 2)
    scale = torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0, 8.0])
    after = (weight.view(2, 2, 3, 2) * scale.view(2, 1, 3, 1)).view(4, 3, 2)
    assert growth_and_spread(weight, after, transposed=True, groups=2) == (8.0, 8.0)
    assert growth_and_spread(weight * 0, after, transposed=True, groups=2) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_overflow_are_refused(dtype):
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    nn.init.constant_(model[1].weight, 1e4 if dtype == torch.float16 else 1e38)
    nn.init.constant_(model[1].running_var, 0)
    nn.init.constant_(model[0].weight, 0.25)
    _, changes = batchnorm.fold(model)
    assert f"which {dtype} cannot" in changes[0].reason


def test_requires_grad_stays():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False), nn.BatchNorm2d(4)))
    folded, _ = batchnorm.fold(model)
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad
