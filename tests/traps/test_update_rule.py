"""How running statistics follow those of the batches, and what is mistaken for it."""

import pytest
import torch
from torch import nn

from batchnorm.nn import BatchNorm1d, GhostBatchNorm1d


@pytest.mark.parametrize("make", [nn.BatchNorm1d, BatchNorm1d])
def test_momentum_is_the_weight_of_the_new_batch_so_that_of_keras_keeps_only_the_last(make: type[nn.BatchNorm1d]):
    batches = torch.randn(50, 8, 1) + torch.arange(50.0).view(-1, 1, 1)
    pasted, meant = make(1, momentum=0.99), make(1, momentum=1 - 0.99)
    for batch in batches:
        pasted(batch), meant(batch)
    last, share = batches[-1].mean(), 0.01
    assert abs(pasted.running_mean - last) < 0.1
    expected = sum(share * (1 - share) ** (49 - k) * batch.mean() for k, batch in enumerate(batches))
    torch.testing.assert_close(meant.running_mean, expected.view(1))


@pytest.mark.parametrize("make", [nn.BatchNorm1d, BatchNorm1d])
def test_what_normalizes_is_divided_by_m_and_what_is_kept_by_m_less_1(make: type[nn.BatchNorm1d]):
    x = torch.tensor([[0.0], [2.0]])
    layer = make(1, eps=1e-12, momentum=1.0)
    torch.testing.assert_close(layer(x).detach(), torch.tensor([[-1.0], [1.0]]))
    assert layer.running_var.item() == 2.0
    # so the same batch does not give the same output in evaluation
    torch.testing.assert_close(layer.eval()(x).detach(), torch.tensor([[-1.0], [1.0]]) / 2**0.5)


def test_chunks_with_a_share_of_the_momentum_forget_less_and_count_more_than_one_batch():
    momentum, chunks = 0.1, 8
    x = torch.randn(64, 1) + 5
    by_hand = nn.BatchNorm1d(1, momentum=momentum / chunks)
    for chunk in x.chunk(chunks):
        by_hand(chunk)
    ghost = GhostBatchNorm1d(1, momentum=momentum, ghost_batch_size=64 // chunks)
    ghost(x)
    whole = nn.BatchNorm1d(1, momentum=momentum)
    whole(x)
    kept = (1 - momentum / chunks) ** chunks
    assert 1 - kept == pytest.approx(0.0957, abs=1e-4)
    assert (by_hand.num_batches_tracked, ghost.num_batches_tracked) == (chunks, 1)
    assert abs(by_hand.running_mean - whole.running_mean) > 0.01
    torch.testing.assert_close(ghost.running_mean, whole.running_mean)
    # variances within chunks alone would be less
    torch.testing.assert_close(ghost.running_var, whole.running_var)
