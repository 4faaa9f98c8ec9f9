"""The kernels in two halves: two replicas with parts of a batch compute what one computes with all of it."""

import pytest
import torch

from batchnorm import reference
from batchnorm._ops.split import apply_gradient, batch_statistics, gradient_sums, normalize
from layouts import channels_last, contiguous

EPS = 1e-5
FORMS = {
    "dense": ((11, 5), contiguous),
    "rows": ((3, 4, 10, 11), contiguous),
    "few_positions": ((5, 3, 2, 3), contiguous),
    "channels_last": ((4, 6, 5, 3), channels_last),
    "volume_channels_last": ((4, 3, 2, 3, 2), channels_last),
}


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("form", FORMS)
def test_two_replicas_of_different_size_equal_one(form, with_residual, activation):
    shape, arrange = FORMS[form]
    x, residual, grad_output = (arrange(torch.randn(shape, dtype=torch.float64) * 3 + 40) for _ in range(3))
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    expected = reference.batch_norm_train(
        *leaves[:3], residual=residual if with_residual else None, activation=activation, eps=EPS
    )
    wanted = leaves if with_residual else leaves[:3]
    expected_grads = torch.autograd.grad(expected.output, wanted, grad_output)

    def parts(t: torch.Tensor) -> list[torch.Tensor]:
        return [arrange(part.detach()) for part in (t[:1], t[1:])]

    xs, residuals, grads = parts(x), parts(residual) if with_residual else [None, None], parts(grad_output)
    weight, bias = weight.detach(), bias.detach()
    counts = [reference.values_per_channel(part) for part in xs]
    mean, _ = reference.pooled_statistics(*zip(*map(batch_statistics, xs), strict=True), counts)
    spread = [var + (m - mean).square() for m, var in map(batch_statistics, xs)]
    var = sum(c * s for c, s in zip(counts, spread, strict=True)) / sum(counts)
    torch.testing.assert_close((mean, var), (expected.mean, expected.var))
    saved = torch.stack([mean, torch.rsqrt(var + EPS)])
    outputs = [normalize(p, saved, weight, bias, z, activation) for p, z in zip(xs, residuals, strict=True)]
    torch.testing.assert_close(torch.cat(outputs), expected.output.detach())

    halves = [
        gradient_sums(g, p, saved, weight, bias, z, activation) for g, p, z in zip(grads, xs, residuals, strict=True)
    ]
    sums = sum(half[0] for half in halves)
    grad_input = [
        apply_gradient(half[3], p, saved, weight, sums, sum(counts)) for half, p in zip(halves, xs, strict=True)
    ]
    actual = [torch.cat(grad_input), sum(half[1] for half in halves), sum(half[2] for half in halves)]
    if with_residual:
        actual.append(torch.cat([half[3] for half in halves]))
    torch.testing.assert_close(actual, list(expected_grads))
