"""Results of the kernels against float64: never worse than ATen's, right to a few roundings where ATen loses digits."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm import functional, reference
from tolerance import assert_same_nonfinite, assert_within_budget

EPS, MOMENTUM = 1e-5, 0.1
NAMES = (
    "output", "mean", "var", "running_mean", "running_var", "evaluation",
    "grad_input", "grad_weight", "grad_bias", "grad_residual",
)  # fmt: skip
BENDS = {"relu": (0.0,)}


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


class Problem:
    """A call: tensors in the dtype under test, what follows the normalization, and how the tensors lie."""

    def __init__(self, x: Tensor, activation: str | None = None, with_residual: bool = False, arrange=contiguous):
        channels, dtype = x.shape[1], x.dtype
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        self.activation, self.with_residual, self.arrange = activation, with_residual, arrange
        self.weight, self.bias = torch.randn(2, channels, dtype=wide)
        self.running = (torch.randn(channels, dtype=wide), torch.rand(channels, dtype=wide) + 0.5)
        self.x, self.residual, self.grad_output = x, torch.randn(x.shape).to(dtype), torch.randn(x.shape).to(dtype)
        if activation in BENDS and x.numel():
            # rounding decides on which side of a bend they lie
            exact = reference.batch_norm_train(x.double(), self.weight.double(), self.bias.double(), eps=EPS).output
            z = exact + self.residual.double() if with_residual else exact
            for bend in BENDS[activation]:
                self.grad_output[(z - bend).abs() < torch.finfo(dtype).eps ** (1 / 3)] = 0

    def results(self, implementation: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """All results by name order of :data:`NAMES`; computed from copies of another dtype if one is given."""

        def copy(tensor: Tensor, arrange=contiguous) -> Tensor:
            return arrange(tensor.to(dtype or tensor.dtype).clone()).detach()

        x, residual = (copy(t, self.arrange).requires_grad_() for t in (self.x, self.residual))
        weight, bias = (copy(t).requires_grad_() for t in (self.weight, self.bias))
        running_mean, running_var = (copy(t) for t in self.running)
        extra = {"residual": residual if self.with_residual else None, "activation": self.activation}
        if implementation == "torch":
            extra = {}
            run, infer = by_torch_train, by_torch_inference
        else:
            extra["implementation"] = implementation
            run, infer = functional.batch_norm_train, functional.batch_norm_inference
        output, mean, var, count = run(x, weight, bias, eps=EPS, **extra)
        if implementation == "torch":
            output = self.finish(output, residual)
        leaves = [x, weight, bias, *([residual] if self.with_residual else [])]
        gradients = torch.autograd.grad(output, leaves, copy(self.grad_output, self.arrange))
        with torch.no_grad():
            if implementation == "kernel":
                again = functional.batch_norm(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS, **extra)
                assert torch.equal(again.nan_to_num(), output.nan_to_num())
            else:
                running_mean = reference.running_average(running_mean, mean, MOMENTUM)
                running_var = reference.running_average(running_var, reference.var_unbiased(var, count), MOMENTUM)
            # the statistics of the problem, so that errors of those above do not count again
            evaluated = infer(x, *(copy(t) for t in self.running), weight, bias, eps=EPS, **extra)
            if implementation == "torch":
                evaluated = self.finish(evaluated, residual)
        results = [output, mean, var, running_mean, running_var, evaluated, *gradients]
        return [result.detach() for result in results]

    def finish(self, z: Tensor, residual: Tensor) -> Tensor:
        return reference.activate(z, residual if self.with_residual else None, self.activation)

    def exact(self) -> list[Tensor]:
        return self.results("reference", torch.float64)

    def roundings(self, exact: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What the exact results become by one rounding: of the result, and of every term where it is a sum."""
        x, weight, bias, residual, grad_output = (
            t.double() for t in (self.x, self.weight, self.bias, self.residual, self.grad_output)
        )
        total = (residual if self.with_residual else torch.zeros_like(x)).requires_grad_()
        normalized = reference.batch_norm_train(x, eps=EPS).output
        output = reference.activate(reference.scale_and_shift(normalized, weight, bias), total, self.activation)
        (g,) = torch.autograd.grad(output, total, grad_output)
        eps, dims = torch.finfo(self.weight.dtype).eps, reference.reduced_dims(x)
        invstd = (reference.batch_var(x, reference.batch_mean(x)) + EPS).rsqrt()
        terms = {
            "grad_input": (g * reference.per_channel(weight * invstd, x)).abs(),
            "grad_weight": (g * normalized).abs().sum(dims),
            "grad_bias": g.abs().sum(dims),
        }
        return [
            value.to(self.weight.dtype if value.dim() == 1 else dtype).double() + eps * terms.get(name, 0)
            for name, value in zip(NAMES, exact, strict=False)
        ]


def by_torch_train(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """torch's own kernel; momentum 1 hands out its statistics."""
    count = reference.values_per_channel(x)
    mean, var = torch.zeros(2, x.shape[1], dtype=weight.dtype)
    output = torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    return output, mean, var * ((count - 1) / count), count


def by_torch_inference(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def check_no_worse_than_torch(problem: Problem) -> None:
    check_against(problem, problem.results("torch"), problem.results("reference"))


def check_against_rounded(problem: Problem, without: Sequence[str] = ()) -> None:
    """As if the baseline were the exact result, rounded to the dtype."""
    check_against(problem, without=without)


def check_against(problem: Problem, *baselines: list[Tensor], without: Sequence[str] = ()) -> None:
    exact = problem.exact()
    baselines = (*baselines, problem.roundings(exact, problem.x.dtype))
    for name, result, true, *others in zip(NAMES, problem.results("kernel"), exact, *baselines, strict=False):
        if name not in without:
            assert_within_budget(result, others, true, name)


# One shape for every form of the kernels

FORMS = {
    "rows": ((3, 5, 10, 11), contiguous),
    "rows_of_one_channel": ((4, 1, 9, 11), contiguous),
    "columns": ((5, 6, 3, 5), contiguous),
    "sequence": ((7, 5, 33), contiguous),
    "channels_last": ((3, 5, 6, 7), channels_last),
    "channels_last_3d": ((2, 6, 3, 4, 5), channels_last),
    "dense": ((31, 5), contiguous),
    "dense_strips": ((9, 1100), contiguous),
    "joined_rows": ((1001, 7), contiguous),
    "segments": ((2, 2, 131, 130), contiguous),
}
EPILOGUES = {"plain": (None, False), "relu": ("relu", False), "add_relu": ("relu", True), "add_silu": ("silu", True)}
# in units of the standard deviation, which is 1; beyond, neighbours in bfloat16 are further apart than that
OFFSETS = {torch.float32: (0.0, 1e4, 1e6), torch.bfloat16: (0.0, 1e2)}
CASES = [
    pytest.param(form, dtype, offset, id=f"{form}-{str(dtype)[6:]}-{offset:g}")
    for form in FORMS
    for dtype, offsets in OFFSETS.items()
    for offset in offsets
]


def epilogues(dtype: torch.dtype, form: str | None = None) -> Sequence[str]:
    """Those with kernels of their own; few, since each takes seconds to compile."""
    if dtype == torch.bfloat16:
        return ("add_relu",)
    return tuple(EPILOGUES) if form in ("columns", "dense", "channels_last") else ("plain", "relu", "add_relu")


@pytest.mark.parametrize(("form", "dtype", "offset"), CASES)
def test_every_result_is_right_in_every_form(form, dtype, offset):
    shape, arrange = FORMS[form]
    for name in epilogues(dtype, form):
        problem = Problem((torch.randn(shape) + offset).to(dtype), *EPILOGUES[name], arrange)
        check_no_worse_than_torch(problem)
        check_against_rounded(problem)


# Any shape, stride and scale

sizes = st.sampled_from([1, 2, 3, 5, 7, 17])
shapes = st.tuples(
    sizes, st.sampled_from([1, 2, 3, 33]), st.lists(st.sampled_from([1, 2, 3, 7, 11, 19]), max_size=3)
).map(lambda parts: (parts[0], parts[1], *parts[2]))
usable_shapes = shapes.filter(lambda shape: 2 <= torch.Size(shape).numel() // shape[1] <= 8000)
arrangements = st.sampled_from([contiguous, channels_last, strided, transposed])
searched = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@searched
@given(
    shape=usable_shapes,
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    offset=st.sampled_from([0.0, -3.0, 100.0]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    epilogue=st.sampled_from(["plain", "relu", "add_relu"]),
    arrange=arrangements,
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_stride_is_no_worse_than_torch(shape, dtype, offset, scale, epilogue, arrange, seed):
    torch.manual_seed(seed)
    x = ((torch.randn(shape) + offset) * scale).to(dtype)
    epilogue = epilogue if epilogue in epilogues(dtype) else "add_relu"
    check_no_worse_than_torch(Problem(x, *EPILOGUES[epilogue], arrange))


@searched
@given(
    # two values are normalized to -1 and 1 whatever they are: nothing of the gradient remains but its rounding
    shape=usable_shapes.filter(lambda shape: torch.Size(shape).numel() > 2 * shape[1]),
    value=st.sampled_from([-1e6, 1e3, 1e8]),
    where=st.sampled_from(["first", "last"]),
    arrange=arrangements,
    seed=st.integers(0, 2**31),
)
def test_outlier_costs_no_digits_even_as_first_value(shape, value, where, arrange, seed):
    torch.manual_seed(seed)
    x = torch.randn(shape)
    place = 0 if where == "first" else -1
    x[(place, slice(None), *[place] * (len(shape) - 2))] = value
    check_no_worse_than_torch(Problem(x, arrange=arrange))


VALUES = {"zero": 0.0, "three": 3.0, "large": -1e4, "denormal": 1e-40, "huge": 1e30}


@pytest.mark.parametrize("form", ["rows", "columns", "channels_last", "joined_rows"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_constant_channel_yields_exactly_the_bias(value, form):
    shape, arrange = FORMS[form]
    x = arrange(torch.full(shape, value))
    weight, bias = torch.randn(2, shape[1])
    output, mean, var, _ = functional.batch_norm_train(x, weight, bias, implementation="kernel")
    assert torch.equal(output, reference.per_channel(bias, x).expand_as(x))
    assert torch.equal(mean, torch.full((shape[1],), value))
    assert torch.equal(var, torch.zeros(shape[1]))


@pytest.mark.parametrize("form", ["rows", "columns", "channels_last", "dense", "joined_rows"])
@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e12, 1e15])
def test_scales_far_from_one_cost_no_digits(scale, form):
    shape, arrange = FORMS[form]
    check_against_rounded(Problem((torch.randn(shape).double() * scale).float(), arrange=arrange))


@pytest.mark.parametrize("form", ["rows", "columns", "channels_last", "dense", "joined_rows"])
@pytest.mark.parametrize("scale", [1e18, 1e30])
def test_huge_values_normalize_like_any_others(scale, form):
    shape, arrange = FORMS[form]
    problem = Problem(torch.randn(shape) * scale, arrange=arrange)
    # float32 holds neither a variance of 1e60 nor 1 / variance, a factor of the gradient
    check_against_rounded(problem, without=("var", "running_var", "grad_input") if scale == 1e30 else ())


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("form", ["rows", "columns", "channels_last", "dense", "dense_strips", "joined_rows"])
def test_inf_and_nan_stand_where_torch_has_them(form, place, bad):
    shape, arrange = FORMS[form]
    x = torch.randn(shape)
    at = {"first": 0, "middle": 1, "last": -1}[place]
    channel = min(2, shape[1] - 1)
    x[(at, channel, *[at] * (len(shape) - 2))] = bad
    for epilogue in epilogues(x.dtype, form):
        activation, with_residual = EPILOGUES[epilogue]
        problem = Problem(x, activation, with_residual, arrange)
        problem.grad_output.abs_().add_(0.1)
        results = problem.results("kernel")
        for name, result, *others in zip(
            NAMES, results, problem.results("torch"), problem.results("reference"), strict=False
        ):
            assert_same_nonfinite(result, others, f"{name} after {activation}")
        assert results[0].index_select(1, torch.tensor([0, 1])).isfinite().all()


EMPTY = [(0, 3), (0, 3, 2, 2), (2, 3, 0), (4, 0), (2, 0, 5, 5)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_batch_changes_nothing_and_has_zero_gradients(shape):
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(shape[1], requires_grad=True) for _ in range(2))
    mean, var = torch.randn(shape[1]), torch.rand(shape[1])
    before = mean.clone(), var.clone()
    for training in (True, False):
        output = functional.batch_norm(
            x, mean, var, weight, bias, training, residual=residual, activation="relu", implementation="kernel"
        )
        assert output.shape == shape
        gradients = torch.autograd.grad(output.sum(), (x, weight, bias, residual))
        assert all((gradient == 0).all() for gradient in gradients)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (1, 1, 2), (1, 5, 1, 2), (2, 700), (1, 2, 97)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_values_per_channel_are_enough(shape, dtype):
    for offset in OFFSETS[dtype][:2]:
        check_no_worse_than_torch(Problem((torch.randn(shape) + offset).to(dtype), *EPILOGUES["add_relu"]))


# The same bits for any number of threads

THREADED = {
    "rows": (16, 20, 10, 10),
    "columns": (64, 100, 2, 2),
    "strips": (250, 600),
    "joined_rows": (5001, 6),
    "segments": (2, 3, 131, 130),
    "blocked": (8, 1, 64, 64),
    "channels_last": (9, 24, 16, 16),
    "volume_channels_last": (5, 31, 6, 6, 6),
}


@pytest.fixture
def any_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(problem: Problem) -> list[Tensor]:
    return [
        result.view(torch.int32 if result.dtype == torch.float32 else torch.int16)
        for result in problem.results("kernel")
    ]


@pytest.mark.parametrize("form", THREADED)
@pytest.mark.parametrize("epilogue", ["plain", "add_relu"])
def test_results_are_the_same_bits_for_any_number_of_threads(epilogue, form, any_number_of_threads):
    arrange = channels_last if "channels_last" in form else contiguous
    problem = Problem(torch.randn(THREADED[form]) + 3, *EPILOGUES[epilogue], arrange)
    expected = bits(problem)
    for threads in (1, 2, 3, 5, 2):
        torch.set_num_threads(threads)
        for name, ours, theirs in zip(NAMES, bits(problem), expected, strict=False):
            assert torch.equal(ours, theirs), f"{name} with {threads} threads"
    torch.set_num_threads(1)
    check_no_worse_than_torch(problem)


def test_large_results_are_the_same_bits_and_right(any_number_of_threads):
    # 6.4 million elements: written past the caches, in memory that is used again
    x = torch.randn(2, 50, 254, 254)
    weight, bias = torch.randn(2, 50)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        output, mean, var, _ = functional.batch_norm_train(leaf, weight, bias, implementation="kernel")
        return [output.detach(), mean, var, *torch.autograd.grad(output, leaf, x.flip(0))]

    expected = run(1)
    assert all(torch.equal(a, b) for a, b in zip(run(3), expected, strict=True))
    y = by_torch_train(x.double(), weight.double(), bias.double(), EPS)
    for name, result, exact in zip(NAMES, expected, y[:3], strict=False):
        assert_within_budget(result, [exact.to(result.dtype)], exact, name)


def test_layer_in_bfloat16_throughout_rounds_each_result_once():
    """Parameters and running statistics are read and written as they are, without copies in float32."""
    x, residual, grad_output = torch.randn(3, 8, 5, 6, 6).bfloat16()
    weight, bias, running_mean = torch.randn(3, 5).bfloat16()
    running_var = torch.rand(5).bfloat16()

    def results(dtype: torch.dtype) -> list[Tensor]:
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, bias, residual)]
        input, gamma, beta, shortcut = leaves
        y = functional.batch_norm(input, mean, var, gamma, beta, True, 0.1, residual=shortcut, activation="relu")
        evaluated = functional.batch_norm(input, mean, var, gamma, beta, residual=shortcut, activation="relu")
        return [y.detach(), evaluated.detach(), mean, var, *torch.autograd.grad(y, leaves, grad_output.to(dtype))]

    ours, exact = results(torch.bfloat16), results(torch.float64)
    for got, expected in zip(ours, exact, strict=True):
        assert got.dtype is torch.bfloat16
        # half a unit in the last place, and as much again for the running statistics that evaluation reads rounded
        torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=2**-8)
