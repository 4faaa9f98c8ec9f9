"""Domain-specific batch normalization: one layer per domain, and a domain is one of them."""

import pytest
import torch

import batchnorm.nn as bnn

LAYERS = pytest.mark.parametrize(
    ("make", "plain", "shape"),
    [
        (bnn.DomainBatchNorm1d, bnn.BatchNorm1d, (4, 3)),
        (bnn.DomainBatchNorm2d, bnn.BatchNorm2d, (4, 3, 2, 5)),
        (bnn.DomainBatchNorm3d, bnn.BatchNorm3d, (4, 3, 2, 1, 2)),
    ],
    ids=["1d", "2d", "3d"],
)


@LAYERS
def test_each_domain_is_a_batch_norm_of_its_own(make, plain, shape):
    layer, alone = make(3, num_domains=3, activation="relu"), [plain(3, activation="relu") for _ in range(3)]
    for step in range(4):
        domain = (0, 2, 0, 2)[step]
        x, residual = torch.randn(2, *shape) + step
        assert torch.equal(layer(x, domain, residual), alone[domain](x, residual))
    for domain, expected in enumerate(alone):
        torch.testing.assert_close(dict(layer.domains[domain].state_dict()), dict(expected.state_dict()))
    x = torch.randn(shape)
    layer.eval()
    for domain, expected in enumerate(alone):
        assert torch.equal(layer(x, domain), expected.eval()(x))


def test_other_domains_get_no_gradient():
    layer = bnn.DomainBatchNorm1d(3, num_domains=2)
    layer(torch.randn(4, 3), 1).sum().backward()
    assert layer.domains[0].weight.grad is None
    assert layer.domains[1].bias.grad.eq(4).all()


@pytest.mark.parametrize(
    ("domain", "error", "message"),
    [
        (2, IndexError, "domain should be 0 to 1, got 2"),
        (-1, IndexError, "domain should be 0 to 1, got -1"),
        (0.0, TypeError, "domain should be int, the domain of all samples, not float"),
        (torch.tensor([0, 1]), TypeError, "not Tensor"),
    ],
    ids=str,
)
def test_what_is_no_domain_is_refused_untouched(domain, error, message):
    layer = bnn.DomainBatchNorm1d(3, num_domains=2)
    with pytest.raises(error, match=message):
        layer(torch.randn(4, 3), domain)
    torch.testing.assert_close(dict(layer.state_dict()), dict(bnn.DomainBatchNorm1d(3, 2).state_dict()))


def test_no_domain_at_all_is_refused():
    with pytest.raises(ValueError, match="num_domains should be at least 1, got 0"):
        bnn.DomainBatchNorm2d(3, num_domains=0)
