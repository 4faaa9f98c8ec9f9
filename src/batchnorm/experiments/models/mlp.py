"""The multi-layer perceptron of section 4.1, several of them trained side by side.

A stack of S networks is one module: weights (S, in, out), activations (S, m, features). One matrix product serves all,
so that Python and dispatch cost once per stack; the networks share nothing.
"""

import itertools

import torch
from torch import Tensor, nn

import batchnorm.nn


class StackedLinear(nn.Module):
    """S linear maps side by side: (S, m, in) to (S, m, out). Input (m, in) goes to every network of the stack."""

    def __init__(self, stack: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(stack, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(stack, 1, out_features)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            stack, in_features, out_features = self.weight.shape
            output = input @ self.weight.transpose(0, 1).reshape(in_features, stack * out_features)
            output = output.view(-1, stack, out_features).transpose(0, 1)
            return output if self.bias is None else output + self.bias
        if self.bias is None:
            return torch.bmm(input, self.weight)
        return torch.baddbmm(self.bias, input, self.weight)


class StackedBatchNorm(nn.Module):
    """BN of (S, m, features) and the sigmoid after it: each network normalizes over its own m examples.

    One BatchNorm1d of S x features, with the sigmoid as part of it.
    """

    def __init__(self, stack: int, features: int, eps: float, momentum: float) -> None:
        super().__init__()
        self.norm = batchnorm.nn.BatchNorm1d(stack * features, eps=eps, momentum=momentum, activation="sigmoid")

    def forward(self, input: Tensor) -> Tensor:
        stack, count, features = input.shape
        output = self.norm(input.transpose(0, 1).reshape(count, stack * features))
        return output.view(count, stack, features).transpose(0, 1)

    def before_sigmoid(self, input: Tensor) -> Tensor:
        """What the sigmoid receives."""
        self.norm.activation = None
        try:
            return self(input)
        finally:
            self.norm.activation = "sigmoid"


class StackedMLP(nn.Module):
    """Fully connected sigmoid networks, ``z = g(BN(Wu))`` or ``z = g(Wu + b)`` in every hidden layer.

    Args:
        seeds: one network per seed. Weights are drawn from N(0, init_std^2) by a generator of that seed, so that
            networks of the same seed begin with the same weights with and without BN, in whatever stack they are.
        sizes: features of input, hidden layers and output, such as (784, 100, 100, 100, 10).
        batch_norm: normalize before each sigmoid and drop the bias there, which BN would cancel.
        init_std: standard deviation of the initial weights. Biases begin at 0.
        eps: of the BN layers.
        momentum: of the BN layers.

    Shape:
        input (S, m, in), or (m, in) for all networks alike; output (S, m, out), scores before the softmax.

    Example:
        >>> network = StackedMLP([0, 1], (784, 100, 10), batch_norm=True, init_std=0.1)
        >>> network(torch.rand(2, 60, 784)).shape
        torch.Size([2, 60, 10])
    """

    def __init__(
        self,
        seeds: list[int],
        sizes: tuple[int, ...],
        *,
        batch_norm: bool,
        init_std: float,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        stack = len(seeds)
        *hidden, last = itertools.pairwise(sizes)
        self.linears = nn.ModuleList(StackedLinear(stack, n_in, n_out, not batch_norm) for n_in, n_out in hidden)
        self.norms = nn.ModuleList(
            StackedBatchNorm(stack, n_out, eps, momentum) if batch_norm else nn.Sigmoid() for _, n_out in hidden
        )
        self.output = StackedLinear(stack, *last, True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            for linear in [*self.linears, self.output]:
                for weight, generator in zip(linear.weight, generators, strict=True):
                    weight.normal_(0.0, init_std, generator=generator)

    def forward(self, input: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            input = norm(linear(input))
        return self.output(input)

    def last_sigmoid_input(self, input: Tensor) -> Tensor:
        """What goes into the sigmoids of the last hidden layer, (S, m, features); with BN, that is BN's output."""
        *linears, last_linear = self.linears
        *norms, last_norm = self.norms
        for linear, norm in zip(linears, norms, strict=True):
            input = norm(linear(input))
        z = last_linear(input)
        return last_norm.before_sigmoid(z) if isinstance(last_norm, StackedBatchNorm) else z

    def network_state(self, i: int) -> dict[str, Tensor]:
        """The i-th network alone, in the names and shapes of ``nn.Linear`` and ``nn.BatchNorm1d``."""
        state = {}
        named = [*((f"hidden.{k}", linear) for k, linear in enumerate(self.linears)), ("output", self.output)]
        for name, linear in named:
            state[f"{name}.weight"] = linear.weight[i].detach().mT.contiguous()
            if linear.bias is not None:
                state[f"{name}.bias"] = linear.bias[i, 0].detach().clone()
        stack = self.output.weight.shape[0]
        for k, norm in enumerate(self.norms):
            for name, value in norm.state_dict(prefix="").items():
                own = value if value.dim() == 0 else value.view(stack, -1)[i]
                state[f"norm.{k}.{name.removeprefix('norm.')}"] = own.detach().clone()
        return state
