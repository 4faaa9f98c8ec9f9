"""A stack of S networks is S plain torch networks."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from batchnorm.experiments.models.mlp import StackedMLP

SIZES = (12, 7, 5, 3)
SEEDS = [3, 1, 4]
EPS, MOMENTUM = 1e-3, 0.2


class PlainMLP(nn.Module):
    """One network of the stack as anybody would write it."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        hidden = list(itertools.pairwise(SIZES[:-1]))
        self.hidden = nn.ModuleList(nn.Linear(a, b, bias=not batch_norm) for a, b in hidden)
        norms = [nn.BatchNorm1d(b, eps=EPS, momentum=MOMENTUM) if batch_norm else nn.Identity() for _, b in hidden]
        self.norm = nn.ModuleList(norms)
        self.output = nn.Linear(*SIZES[-2:])

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.hidden, self.norm, strict=True):
            x = torch.sigmoid(norm(linear(x)))
        return self.output(x)


def make_stack(batch_norm: bool, seeds: list[int] = SEEDS) -> StackedMLP:
    stack = StackedMLP(seeds, SIZES, batch_norm=batch_norm, init_std=0.5, eps=EPS, momentum=MOMENTUM).double()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if not name.endswith("weight") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return stack


def plain_copies(stack: StackedMLP, batch_norm: bool) -> list[PlainMLP]:
    networks = []
    for i in range(len(SEEDS)):
        network = PlainMLP(batch_norm).double()
        network.load_state_dict(stack.network_state(i))
        networks.append(network.train(stack.training))
    return networks


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("batch_norm", [True, False], ids=["bn", "plain"])
def test_the_stack_equals_separate_torch_networks(batch_norm: bool, training: bool):
    stack = make_stack(batch_norm).train()
    stack(torch.randn(3, 9, 12, dtype=torch.float64))
    stack.train(training)
    networks = plain_copies(stack, batch_norm)
    x = (torch.randn(3, 9, 12, dtype=torch.float64) + 1e2).requires_grad_()
    grad_output = torch.randn(3, 9, 3, dtype=torch.float64)
    output = stack(x)
    (grad_input,) = torch.autograd.grad(output, x, grad_output, retain_graph=True)
    output.backward(grad_output)
    for i, network in enumerate(networks):
        own = x[i].detach().clone().requires_grad_()
        expected = network(own)
        expected.backward(grad_output[i])
        torch.testing.assert_close(output[i], expected)
        torch.testing.assert_close(grad_input[i], own.grad)
        for name, value in stack.network_state(i).items():
            torch.testing.assert_close(value, network.state_dict()[name], msg=name)
        for k, linear in enumerate([*network.hidden, network.output]):
            stacked = [*stack.linears, stack.output][k]
            torch.testing.assert_close(stacked.weight.grad[i].mT, linear.weight.grad)
            if linear.bias is not None:
                torch.testing.assert_close(stacked.bias.grad[i, 0], linear.bias.grad)
        for k, norm in enumerate(network.norm):
            for name, parameter in norm.named_parameters():
                stacked = getattr(stack.norms[k].norm, name)
                torch.testing.assert_close(stacked.grad.view(3, -1)[i], parameter.grad)


@pytest.mark.parametrize("batch_norm", [True, False], ids=["bn", "plain"])
def test_shared_input_equals_the_same_input_per_network(batch_norm: bool):
    stack = make_stack(batch_norm).eval()
    x = torch.randn(9, 12, dtype=torch.float64)
    torch.testing.assert_close(stack(x), stack(x.expand(3, 9, 12)))
    torch.testing.assert_close(stack.last_sigmoid_input(x), stack.last_sigmoid_input(x.expand(3, 9, 12)))


@pytest.mark.parametrize("batch_norm", [True, False], ids=["bn", "plain"])
def test_shared_input_gives_the_same_gradients(batch_norm: bool):
    x = torch.randn(9, 12, dtype=torch.float64)
    shared, separate = make_stack(batch_norm), make_stack(batch_norm)
    shared(x).square().sum().backward()
    separate(x.expand(3, 9, 12)).square().sum().backward()
    for a, b in zip(shared.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_seed_gives_the_same_weights_in_any_stack_and_both_arms():
    def weights(seeds: list[int], i: int, batch_norm: bool) -> dict[str, Tensor]:
        stack = StackedMLP(seeds, SIZES, batch_norm=batch_norm, init_std=0.1)
        return {name: value for name, value in stack.network_state(i).items() if name.endswith("weight")}

    alone = weights([4], 0, False)
    for other in (weights([3, 1, 4], 2, False), weights([4, 0], 0, True)):
        for name, value in alone.items():
            assert value.equal(other[name]), name


def test_different_seeds_give_different_weights_of_the_stated_scale():
    stack = StackedMLP([0, 1], (784, 100, 10), batch_norm=True, init_std=0.3)
    first, second = stack.linears[0].weight.detach()
    assert not first.equal(second)
    assert first.mean().abs() < 0.01
    assert first.std() == pytest.approx(0.3, rel=0.02)


def test_networks_of_a_stack_share_nothing():
    stack = make_stack(True).train()
    x = torch.randn(3, 9, 12, dtype=torch.float64)
    before = stack(x)
    x[1] = 1e3
    after = stack(x)
    assert before[[0, 2]].equal(after[[0, 2]])
    assert not before[1].equal(after[1])


def test_the_last_sigmoid_input_is_what_the_output_layer_sees_before_its_sigmoid():
    stack = make_stack(True).eval()
    x = torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(stack(x), stack.output(torch.sigmoid(stack.last_sigmoid_input(x))))


def test_only_networks_without_bn_have_hidden_biases():
    plain = StackedMLP([0], SIZES, batch_norm=False, init_std=0.1).network_state(0)
    bn = StackedMLP([0], SIZES, batch_norm=True, init_std=0.1).network_state(0)
    assert "hidden.0.bias" in plain
    assert "hidden.0.bias" not in bn
    assert "output.bias" in bn
    assert not plain["hidden.0.bias"].any()
