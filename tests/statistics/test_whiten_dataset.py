"""``whiten_dataset`` whitens the population, however it is cut into batches, and as a layer would in evaluation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm.nn import Whitening1d, Whitening2d
from batchnorm.relatives import whitening
from batchnorm.statistics import whiten_dataset

methods = pytest.mark.parametrize("method", whitening.METHODS)
CONVERGED = 60


def correlated(offset: float = 0.0, count: int = 200) -> Tensor:
    return torch.randn(count, 6) @ torch.randn(6, 6) + offset


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [[200], [1, 99, 0, 100], [67, 67, 66]])
def test_moments_are_those_of_all_data_at_once(offset: float, sizes: list[int]):
    data = correlated(offset)
    fitted = whiten_dataset([(batch, "label") for batch in data.split(sizes)])
    np.testing.assert_allclose(fitted.mean.numpy(), data.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(fitted.cov[0].numpy(), np.cov(data.double().numpy().T), rtol=1e-9)
    assert fitted.count == 200


@methods
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_whitened_population_has_the_identity_as_covariance(method: str, offset: float):
    data = correlated(offset)
    white = whiten_dataset(data, method=method, eps=0.0, iterations=CONVERGED).apply(data)
    assert white.dtype == torch.float32
    torch.testing.assert_close(white.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6), atol=1e-4, rtol=0)


@methods
@pytest.mark.parametrize(("layer", "shape"), [(Whitening1d, (50, 6)), (Whitening2d, (10, 6, 5, 3))])
def test_a_layer_with_these_statistics_does_the_same_in_evaluation(method: str, layer, shape: tuple[int, ...]):
    data = torch.randn(shape).double() + 3
    fitted = whiten_dataset(data.split(7), method=method, group_size=3, shrinkage=0.1)
    one = layer(6, momentum=1.0, method=method, group_size=3, shrinkage=0.1, dtype=torch.float64)
    one(data)
    torch.testing.assert_close((one.running_mean, one.running_cov), (fitted.mean, fitted.cov))
    torch.testing.assert_close(one.eval()(data).detach(), fitted.apply(data))


@methods
@pytest.mark.parametrize("options", [{"eps": 1e-5}, {"eps": 0.0, "shrinkage": 0.1}], ids=str)
def test_fewer_values_than_features_are_whitened_with_eps_or_shrinkage(method: str, options: dict):
    data = correlated(count=4)
    assert whiten_dataset(data, method=method, **options).apply(data).isfinite().all()


def test_apply_is_differentiable():
    fitted = whiten_dataset(correlated())
    x = torch.randn(5, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(fitted.apply(x).sum(), x)
    torch.testing.assert_close(grad, fitted.matrix[0].sum(0).float().expand(5, 6))


ONE_NAN = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [0.0, 0.0]])
REFUSED = {
    "a singular covariance": (correlated(count=4), {"eps": 0.0}, "4 values per feature is singular, of rank 3 for 6"),
    "two equal features": (torch.randn(9, 1).expand(9, 2), {"eps": 0.0}, "singular, of rank 1 for 2 features"),
    "nothing": ([], {}, "needs at least 2 values per feature, but the data has 0"),
    "one value": (torch.randn(1, 3), {}, "needs at least 2 values per feature, but the data has 1"),
    "NaN": (ONE_NAN, {}, "the data has inf or NaN"),
    "batches that do not fit": ([torch.randn(5, 3), torch.randn(5, 2)], {},
                                r"expected batches of size \(N, 3, \*\), got \(5, 2\)"),
    "no features": (torch.randn(5), {}, r"expected batches of size \(N, C, \*\), got \(5,\)"),
    "an unknown method": (ONE_NAN, {"method": "svd"}, "unknown method 'svd'"),
    "a group size that does not divide": (ONE_NAN, {"group_size": 3}, "but got 3 for 2 features"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_value(case: str):
    data, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        whiten_dataset(data, **options)


def test_data_of_another_width_is_not_whitened():
    with pytest.raises(ValueError, match=r"expected input of size \(N, 6, \*\), got \(5, 4\)"):
        whiten_dataset(correlated()).apply(torch.randn(5, 4))
