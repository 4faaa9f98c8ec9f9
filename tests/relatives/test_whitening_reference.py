"""Whitening is whitening: by NumPy, by its definition, and by what tells the methods apart."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.relatives import whitening

EPS = 1e-5
# enough for the smallest eigenvalue of `correlated`
CONVERGED = 40
methods = pytest.mark.parametrize("method", whitening.METHODS)


def correlated(count: int = 50, d: int = 4) -> Tensor:
    return torch.randn(count, d, dtype=torch.float64) @ torch.randn(d, d).double() + 5


def whiten(x: Tensor, method: str, **options) -> Tensor:
    return whitening.whiten_train(x, method=method, **{"iterations": CONVERGED, **options}).output


def numpy_whitened(x: Tensor, method: str) -> np.ndarray:
    centered = x.numpy() - x.numpy().mean(0)
    cov = centered.T @ centered / len(centered) + EPS * np.eye(x.shape[1])
    if method == "cholesky":
        return centered @ np.linalg.inv(np.linalg.cholesky(cov)).T
    u, s, _ = np.linalg.svd(cov)
    return centered @ (u / np.sqrt(s) @ u.T)


@pytest.mark.parametrize("method", ["zca", "cholesky", "newton_schulz"])
def test_output_is_that_of_numpy(method: str):
    x = correlated()
    np.testing.assert_allclose(whiten(x, method).numpy(), numpy_whitened(x, method), rtol=1e-8, atol=1e-10)


@methods
@pytest.mark.parametrize("shape", [(50, 4), (2, 4, 9), (3, 4, 5, 4), (50, 1)])
def test_output_has_mean_0_and_the_identity_as_covariance(method: str, shape: tuple[int, ...]):
    x = torch.einsum("nc...,cd->nd...", torch.randn(shape).double() + 5, torch.randn(shape[1], shape[1]).double())
    (values,) = whitening.values_of_groups(whiten(x, method, eps=0.0), shape[1])
    torch.testing.assert_close(values.mean(0), torch.zeros(shape[1]).double())
    torch.testing.assert_close(reference.covariance(values), torch.eye(shape[1]).double())


def test_zca_is_the_reference():
    x = correlated()
    torch.testing.assert_close(whiten(x, "zca"), reference.whiten(x, EPS))


def test_zca_of_rotated_data_is_rotated():
    x, rotation = correlated(), torch.linalg.qr(torch.randn(4, 4).double()).Q
    torch.testing.assert_close(whiten(x @ rotation, "zca"), whiten(x, "zca") @ rotation)


def test_cholesky_makes_a_feature_of_those_before_it():
    x = correlated()
    first = whiten(x, "cholesky")
    x[:, 2:] += torch.randn(50, 2).double()
    torch.testing.assert_close(whiten(x, "cholesky")[:, :2], first[:, :2])


def test_principal_components_come_largest_first():
    x = correlated()
    matrix = whitening.pca_matrix(reference.covariance(x), 0.0)
    variances = matrix.norm(dim=1) ** -2
    assert (variances.diff() < 0).all()
    torch.testing.assert_close(variances.sum(), reference.covariance(x).trace())


@pytest.mark.parametrize("correlation", [-0.5, 0.5])
def test_principal_components_do_not_flip_between_batches(correlation: float):
    # two features of one variance: the components of both eigenvectors are equally large
    factor = torch.linalg.cholesky(torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64))
    cov = factor @ factor.T
    expected = whitening.pca_matrix(cov, 0.0)
    for _ in range(50):
        batch = torch.randn(200, 2, dtype=torch.float64) @ factor.T
        matrix = whitening.pca_matrix(reference.covariance(batch), 0.0)
        assert ((matrix * expected).sum(1) > 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_sign_of_an_eigenvector_does_not_depend_on_the_one_that_was_found(sign: int):
    vectors = torch.linalg.qr(torch.randn(3, 5, 5).double()).Q
    torch.testing.assert_close(
        vectors * whitening.signs(vectors)[:, None], sign * vectors * whitening.signs(sign * vectors)[:, None]
    )


def test_one_step_of_newton_schulz_is_its_formula():
    cov = reference.covariance(correlated())
    trace = cov.trace()
    expected = (1.5 * torch.eye(4).double() - 0.5 * cov / trace) / trace.sqrt()
    torch.testing.assert_close(whitening.newton_schulz_matrix(cov, 0.0, 1), expected)


def test_newton_schulz_approaches_zca_from_below():
    cov = reference.covariance(correlated())
    largest = [torch.linalg.norm(whitening.newton_schulz_matrix(cov, EPS, n), ord=2) for n in (1, 3, 5, CONVERGED)]
    assert all(fewer < more for fewer, more in pairwise(largest))
    torch.testing.assert_close(largest[-1], torch.linalg.norm(whitening.zca_matrix(cov, EPS), ord=2))


def test_shrinkage_keeps_the_trace_and_ends_at_a_multiple_of_the_identity():
    cov = reference.covariance(correlated())
    for shrinkage in (0.0, 0.3, 1.0):
        torch.testing.assert_close(whitening.shrink(cov, shrinkage).trace(), cov.trace())
    torch.testing.assert_close(whitening.shrink(cov, 0.0), cov)
    torch.testing.assert_close(whitening.shrink(cov, 1.0), cov.trace() / 4 * torch.eye(4).double())


@methods
def test_groups_are_whitened_each_by_itself(method: str):
    x = correlated(d=6)
    parts = [whiten(part, method) for part in x.split(2, 1)]
    torch.testing.assert_close(whiten(x, method, group_size=2), torch.cat(parts, 1))


@methods
def test_a_group_of_one_feature_is_batch_normalization(method: str):
    x = correlated().view(10, 4, 5)
    weight, bias = torch.randn(4).double(), torch.randn(4).double()
    output, mean, cov, count = whitening.whiten_train(
        x, weight, bias, method=method, group_size=1, eps=EPS, iterations=CONVERGED
    )
    expected = reference.batch_norm_train(x, weight, bias, eps=EPS)
    torch.testing.assert_close(output, expected.output)
    torch.testing.assert_close((mean, cov.flatten(), count), tuple(expected[1:]))


@methods
def test_statistics_of_the_batch_reproduce_its_output(method: str):
    x = correlated(d=6)
    output, mean, cov, _ = whitening.whiten_train(x, method=method, group_size=3, shrinkage=0.1)
    torch.testing.assert_close(whitening.whiten_inference(x, mean, cov, method=method, shrinkage=0.1), output)
