"""Whitening against the formulation of the research code, and against batch normalization, whose place it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm.nn
from batchnorm.benchmarks.cases import BOTH, Case, Inputs, make_inputs
from batchnorm.benchmarks.correctness import EPS, MOMENTUM, another_function, beyond_budget, doubled
from batchnorm.benchmarks.peers import BATCH_NORM, MATRIX, OURS, Runner, norm_layer, one_line, run_torch
from batchnorm.benchmarks.run import Record, ours_last, timed
from batchnorm.benchmarks.timing import time_in_turn, watch_others
from batchnorm.reference import per_channel, running_average, var_unbiased
from batchnorm.relatives import whitening

SUITE = "whitening"
NAMES = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_cov")


@dataclass(frozen=True)
class WhiteningCase(Case):
    """One call of a whitening layer, forward and backward.

    Attributes:
        method: of whitening.
        group_size: features that are whitened together.
    """

    activation: str | None = None
    method: str = "zca"
    group_size: int = 16

    @property
    def name(self) -> str:
        """Unique in the suite.

        Example:
            >>> WhiteningCase("dense", (256, 64), method="cholesky", group_size=32).name
            'whitening dense 256x64 cholesky 2 groups of 32'
        """
        groups, shape = self.shape[1] // self.group_size, "x".join(map(str, self.shape))
        number = f"{groups} groups" if groups > 1 else "1 group"
        return f"{SUITE} {self.where} {shape} {self.method} {number} of {self.group_size}"


CASES = [
    WhiteningCase(where, (batch, features, *positions), method=method, group_size=group_size)
    for where, batch, positions in (("dense", 256, ()), ("convolution", 32, (16, 16)))
    for features in (32, 64, 128)
    for group_size in (16, 32, 64)
    if group_size <= features
    # those that research code exists for
    for method in ("zca", "newton_schulz", "cholesky")
]


class Matrix(nn.Module):
    """The matrix formulation of the research code: transpose, covariance, matrix, product, differentiated by autograd.

    "zca": Decorrelated BN (Huang et al. 2018). "newton_schulz": IterNorm (Huang et al. 2019). "cholesky": Whitening and
    Coloring (Siarohin et al. 2019).
    """

    running_mean: Tensor
    running_cov: Tensor

    def __init__(self, case: WhiteningCase, inputs: Inputs) -> None:
        super().__init__()
        self.method, self.group_size = case.method, case.group_size
        self.weight, self.bias = nn.Parameter(inputs.weight.clone()), nn.Parameter(inputs.bias.clone())
        self.register_buffer("running_mean", inputs.running_mean.clone())
        self.register_buffer(
            "running_cov", torch.eye(case.group_size).repeat(len(inputs.weight) // case.group_size, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        values = x.transpose(0, 1).reshape(-1, self.group_size, x.numel() // x.shape[1])
        count = values.shape[-1]
        mean = values.mean(-1, keepdim=True)
        centered = values - mean
        cov = centered @ centered.mT / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), MOMENTUM)
            self.running_cov.lerp_(var_unbiased(cov, count), MOMENTUM)
        white = self.matrix(cov + EPS * torch.eye(self.group_size)) @ centered
        output = white.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
        return output * per_channel(self.weight, x) + per_channel(self.bias, x)

    def matrix(self, cov: Tensor) -> Tensor:
        if self.method == "zca":
            values, vectors = torch.linalg.eigh(cov)
            return vectors * values.rsqrt()[:, None] @ vectors.mT
        eye = torch.eye(self.group_size).expand_as(cov)
        if self.method == "cholesky":
            return torch.linalg.solve_triangular(torch.linalg.cholesky(cov), eye, upper=False)
        trace = cov.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        power = eye
        for _ in range(5):
            power = 1.5 * power - 0.5 * torch.matrix_power(power, 3) @ (cov / trace)
        return power * trace.rsqrt()


def ours(case: WhiteningCase, inputs: Inputs) -> nn.Module:
    kind = batchnorm.nn.Whitening2d if len(case.shape) == 4 else batchnorm.nn.Whitening1d
    layer = kind(case.shape[1], EPS, MOMENTUM, method=case.method, group_size=case.group_size)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean"):
            getattr(layer, name).copy_(getattr(inputs, name))
    return layer


def reference_results(case: WhiteningCase, inputs: Inputs) -> list[Tensor]:
    """What :data:`NAMES` says, by the plain formulas in the dtype of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.weight, inputs.bias)]
    output, mean, cov, count = whitening.whiten_train(*leaves, method=case.method, group_size=case.group_size, eps=EPS)
    gradients = torch.autograd.grad(output, leaves, inputs.grad_output)
    start = torch.eye(case.group_size, dtype=cov.dtype).expand_as(cov)
    return [
        output.detach(),
        *gradients,
        running_average(inputs.running_mean, mean.detach(), MOMENTUM),
        running_average(start, var_unbiased(cov.detach(), count), MOMENTUM),
    ]


def measure_whitening(case: WhiteningCase, seconds: float) -> list[Record]:
    """Records of one case: whoever computes something else is left out; without ours there is nothing to time."""
    inputs = make_inputs(case)
    exact, baseline = reference_results(case, doubled(inputs)), reference_results(case, inputs)
    runners: dict[str, Runner] = {}
    records: list[Record] = []
    for name, make in ((OURS, ours), (MATRIX, Matrix)):
        try:
            layer: Any = make(case, inputs)
            runner = run_torch(layer, layer, BOTH, inputs)
            results = [*runner.as_tensors(runner.call()), *(value.clone() for value in runner.statistics())]
            wrong = check(name, results, baseline, exact)
            if wrong is None:
                runners[name] = runner
        except Exception as error:
            wrong = one_line(error)
        if wrong is not None:
            kind = "failed" if name == OURS else "skipped"
            records.append({"kind": kind, "case": case.name, "pass": BOTH, "peer": name, "reason": wrong})
    if OURS in runners:
        norm: Any = norm_layer(batchnorm.nn, case, inputs)
        runners[BATCH_NORM] = run_torch(norm, norm, BOTH, inputs)
        others = watch_others()
        times = time_in_turn({name: runner.call for name, runner in runners.items()}, seconds)
        busy = others()
        own = {"method": case.method, "group_size": case.group_size, "others_cores": busy}
        records += [{**timed(case, BOTH, name, times[name]), **own} for name in sorted(times, key=ours_last)]
    return [{**record, "suite": SUITE} for record in records]


def check(name: str, results: Sequence[Tensor], baseline: Sequence[Tensor], exact: Sequence[Tensor]) -> str | None:
    if name == OURS:
        return beyond_budget(NAMES, results, [baseline], exact)
    return another_function(NAMES, results, exact)
