"""batch_norm against torch.nn.functional.batch_norm: torch's own samples, errors, running statistics, transforms."""

import copy
import re
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import functional, reference
from batchnorm._ops import choice
from batchnorm.errors import BatchNormError, ImplementationError
from layouts import LAYOUTS, tensor_in
from tolerance import assert_within_budget
from torch_samples import OP_INFO

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", choice.IMPLEMENTATIONS)
CPU_DTYPES = sorted(OP_INFO.supported_dtypes("cpu"), key=str)


def run(batch_norm, input: Tensor, args: Sequence, kwargs: dict) -> list[Tensor]:
    """Output, updated running statistics and gradients of one call on copies of its arguments."""
    input, args = copy.deepcopy((input.detach(), [t.detach() if isinstance(t, Tensor) else t for t in args]))
    leaves = [t.requires_grad_() for t in (input, *args[2:]) if t is not None]
    output = batch_norm(input, *args, **kwargs)
    grad_output = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    grads = torch.autograd.grad(output, leaves, grad_output)
    return [output.detach(), *(t for t in args[:2] if t is not None), *grads]


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_torchs_own_samples(dtype, implementation):
    if implementation == "kernel" and dtype == torch.float16:
        with pytest.raises(ImplementationError, match=r"the input is torch\.float16"):
            functional.batch_norm(torch.ones(2, 1).half(), None, None, training=True, implementation="kernel")
        return
    for sample in OP_INFO.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.input.dim() < 2 and implementation == "reference":
            # an empty vector has no channels; torch's kernels, and so "aten" and "auto", let it pass
            continue
        theirs = run(F.batch_norm, sample.input, sample.args, sample.kwargs)
        ours = run(functional.batch_norm, sample.input, sample.args, sample.kwargs | {"implementation": implementation})
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        if dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(ours, theirs)
            continue
        wide = [t.double() if isinstance(t, Tensor) else t for t in sample.args]
        exact = run(F.batch_norm, sample.input.double(), wide, sample.kwargs)
        for actual, baseline, target in zip(ours, theirs, exact, strict=True):
            assert_within_budget(actual, [baseline], target)


BAD_CALLS = {
    "weight_size": ({"weight": torch.ones(2)}, "3 elements not 2"),
    "bias_size": ({"bias": torch.ones(4)}, "3 elements not 4"),
    "running_mean_size": ({"running_mean": torch.zeros(2)}, "running_mean should contain 3 elements not 2"),
    "running_var_size": ({"running_var": torch.ones(1)}, "running_var should contain 3 elements not 1"),
    "negative_eps": ({"eps": -1.0}, "eps must be .*, but got -1.0"),
    "integer_input": ({"input": torch.ones(4, 3, dtype=torch.long)}, "not implemented for '(Long|torch.int64)'"),
    "bool_input": ({"input": torch.ones(4, 3, dtype=torch.bool)}, "not implemented for '(Bool|torch.bool)'"),
    "complex_input": (
        {"input": torch.ones(4, 3, dtype=torch.complex64)},
        "not implemented for '(ComplexFloat|torch.complex64)'",
    ),
    "vector_input": ({"input": torch.ones(3)}, r"input size \(3,\)"),
    "number_as_weight": ({"weight": 1.0}, "must be Tensor, not float"),
    "only_running_mean": ({"running_var": None}, "running_var"),
    "only_running_var": ({"running_mean": None}, "running_mean"),
    "weight_on_meta": ({"weight": torch.ones(3, device="meta")}, "meta.*cpu"),
    "statistics_on_meta": (
        {"running_mean": torch.ones(3, device="meta"), "running_var": torch.ones(3, device="meta")},
        "meta.*cpu",
    ),
    "input_on_meta": ({"input": torch.ones(4, 3, device="meta")}, "cpu.*meta"),
    "double_weight": ({"weight": torch.ones(3).double()}, "mixed dtype"),
    "double_bias": ({"weight": torch.ones(3), "bias": torch.ones(3).double()}, "mixed dtype|scalar type"),
    "double_statistics": (
        {"running_mean": torch.ones(3).double(), "running_var": torch.ones(3).double()},
        "mixed dtype",
    ),
    "double_input": ({"input": torch.ones(4, 3).double()}, "mixed dtype"),
    "half_weight_of_bfloat16": (
        {"input": torch.ones(4, 3).bfloat16(), "weight": torch.ones(3).half(), "bias": torch.ones(3).half()},
        "mixed dtype|scalar type",
    ),
    "momentum_of_none": ({"momentum": None}, "must be float, not NoneType"),
    "momentum_of_text": ({"momentum": "0.1"}, "must be float, not str"),
}
BAD_IN_TRAINING = {
    "zero_eps": ({"eps": 0.0}, "eps must be positive during training, but got 0.0"),
    "one_value": ({"input": torch.ones(1, 3)}, r"more than 1 value per channel.*\[1, 3\]"),
    "one_value_image": ({"input": torch.ones(1, 3, 1, 1)}, r"more than 1 value per channel.*\[1, 3, 1, 1\]"),
}
BAD_IN_EVALUATION = {
    "list_input": ({"input": [[1.0, 2.0, 3.0]] * 4}, "must be Tensor, not list"),
    "no_statistics": ({"running_mean": None, "running_var": None}, "running_mean must be defined in evaluation mode"),
}
ERRORS = [
    pytest.param(training, changes, message, id=f"{name}-{'training' if training else 'evaluation'}")
    for training, extra in ((True, BAD_IN_TRAINING), (False, BAD_IN_EVALUATION))
    for name, (changes, message) in (BAD_CALLS | extra).items()
]


@IMPLEMENTATIONS
@pytest.mark.parametrize(("training", "changes", "message"), ERRORS)
def test_bad_call_raises_what_torch_raises_and_changes_nothing(training, changes, message, implementation):
    call = {"input": torch.randn(4, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    call |= {"training": training, **changes}
    statistics = [call["running_mean"], call["running_var"]]
    before = copy.deepcopy(statistics)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        F.batch_norm(**copy.deepcopy(call))
    with pytest.raises(theirs.type, match=message):
        functional.batch_norm(**call, implementation=implementation)
    for ours, untouched in zip(statistics, before, strict=True):
        assert ours is untouched is None or ours.is_meta or torch.equal(ours, untouched)


@TRAINING
@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.ones(4, 1), r"expected \(4, 3\).*got \(4, 1\)"),
        (torch.ones(4, 3).double(), "torch.float32.*torch.float64"),
        (torch.ones(4, 3, device="meta"), "cpu.*meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_residual_must_match_the_input(residual, message, training, implementation):
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match=message):
        functional.batch_norm(
            torch.randn(4, 3),
            running_mean,
            running_var,
            training=training,
            residual=residual,
            implementation=implementation,
        )
    assert torch.equal(running_mean, torch.zeros(3))


@TRAINING
def test_unknown_names_are_refused_with_the_known_ones(training):
    x, running_mean, running_var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"unknown activation 'swish': expected None or one of relu, .*silu"):
        functional.batch_norm(x, running_mean, running_var, training=training, activation="swish")
    with pytest.raises(ValueError, match=r"unknown implementation 'cuda': expected one of auto, .*reference"):
        functional.batch_norm(x, running_mean, running_var, training=training, implementation="cuda")
    assert torch.equal(running_mean, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@TRAINING
def test_float32_statistics_serve_half_precision_parameters_though_torch_refuses(training, dtype):
    x, weight, bias = torch.randn(8, 3).to(dtype), torch.rand(3).to(dtype), torch.rand(3).to(dtype)
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"expected scalar type (BFloat16|Half) but found Float"):
        F.batch_norm(x, running_mean.clone(), running_var.clone(), weight, bias, training=training)
    output = functional.batch_norm(x, running_mean, running_var, weight, bias, training=training)
    wide = F.batch_norm(x, torch.zeros(3), torch.ones(3), weight.float(), bias.float(), training=training)
    assert output.dtype == dtype
    torch.testing.assert_close(output, wide)
    assert running_mean.dtype == torch.float32
    torch.testing.assert_close(running_mean, 0.1 * x.float().mean(0) if training else torch.zeros(3))


def test_momentum_may_be_a_tensor_as_in_torch():
    x, stats = torch.randn(8, 3), [[torch.zeros(3), torch.ones(3)] for _ in range(2)]
    functional.batch_norm(x, *stats[0], training=True, momentum=torch.tensor(0.25))
    F.batch_norm(x, *stats[1], training=True, momentum=torch.tensor(0.25))
    torch.testing.assert_close(stats[0], stats[1])


@pytest.mark.parametrize("eps", [float("nan"), 0.0, -1e-5])
def test_eps_must_be_positive_in_training(eps):
    with pytest.raises(ValueError, match=re.escape(f"eps must be positive during training, but got {eps}")):
        functional.batch_norm_train(torch.randn(4, 3), eps=eps)


@IMPLEMENTATIONS
@TRAINING
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_every_layout_equals_torch(layout, activation, training, implementation):
    x = tensor_in(layout, torch.float64)
    channels = x.shape[1]
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    residual = torch.randn_like(x)
    results = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        stats = [torch.zeros(channels).double(), torch.ones(channels).double()]
        if ours:
            output = functional.batch_norm(
                leaves[0], *stats, *leaves[1:3], training, residual=leaves[3], activation=activation,
                implementation=implementation,
            )  # fmt: skip
        else:
            output = F.batch_norm(leaves[0], *stats, *leaves[1:3], training) + leaves[3]
            output = output if activation is None else F.gelu(output)
        output.backward(torch.linspace(-1, 1, x.numel()).double().view_as(x))
        results.append((output.detach(), stats, [leaf.grad for leaf in leaves]))
    torch.testing.assert_close(*results)


def test_statistics_carry_no_gradient_but_the_output_depends_on_them():
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for implementation in choice.IMPLEMENTATIONS:
        output, mean, var, count = functional.batch_norm_train(x, implementation=implementation)
        assert not mean.requires_grad
        assert not var.requires_grad
        assert count == 6
        (grad,) = torch.autograd.grad(output.square().sum(), x)
        torch.testing.assert_close(grad.sum(0), torch.zeros(2).double())


def test_train_returns_the_biased_variance():
    x = torch.randn(5, 2, 3)
    for implementation in choice.IMPLEMENTATIONS:
        _, mean, var, count = functional.batch_norm_train(x, implementation=implementation)
        torch.testing.assert_close(mean, x.mean((0, 2)))
        torch.testing.assert_close(var, x.var((0, 2), correction=0))
        assert count == 15


def test_inference_equals_reference_for_every_activation():
    x, residual = torch.randn(2, 6, 3, 2).double()
    mean, var, weight, bias = torch.rand(4, 3).double()
    x, residual = x.unsqueeze(-1), residual.unsqueeze(-1)
    for activation in (None, *reference.ACTIVATIONS):
        options = {"residual": residual, "activation": activation, "eps": 1e-3}
        expected = reference.batch_norm_inference(x, mean, var, weight, bias, **options)
        for implementation in choice.IMPLEMENTATIONS:
            actual = functional.batch_norm_inference(
                x, mean, var, weight, bias, **options, implementation=implementation
            )
            torch.testing.assert_close(actual, expected)


# torch.func and forward-mode differentiation

# torch's own forward-mode formulas are compiled by torch.jit
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def normalized(x: Tensor) -> Tensor:
    return functional.batch_norm_train(x, activation="silu").output


def normalized_by_reference(x: Tensor) -> Tensor:
    return reference.batch_norm_train(x, activation="silu").output


def test_vmap_equals_a_loop():
    xs = torch.randn(4, 5, 3)
    torch.testing.assert_close(torch.vmap(normalized)(xs), torch.stack([normalized(x) for x in xs]))


@FORWARD_MODE
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_func_transforms_equal_those_of_the_reference(transform):
    x = torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(transform(normalized)(x), transform(normalized_by_reference)(x))


def test_grad_transform_equals_autograd():
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(normalized(x).pow(3).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: normalized(x).pow(3).sum())(x.detach()), expected)


@FORWARD_MODE
def test_jvp_equals_finite_differences():
    x, tangent = torch.randn(2, 4, 2, dtype=torch.float64)
    _, derivative = torch.func.jvp(normalized, (x,), (tangent,))
    step = 1e-6
    measured = (normalized(x + step * tangent) - normalized(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, measured, rtol=1e-6, atol=1e-8)


@FORWARD_MODE
def test_forward_mode_ad_equals_torch():
    import torch.autograd.forward_ad as fwAD

    x, tangent = torch.randn(2, 4, 2, dtype=torch.float64)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, tangent)
        ours = fwAD.unpack_dual(functional.batch_norm(dual, None, None, training=True)).tangent
        theirs = fwAD.unpack_dual(F.batch_norm(dual, None, None, training=True)).tangent
    torch.testing.assert_close(ours, theirs)


def test_named_implementation_refuses_transforms_it_cannot_serve():
    refused = pytest.raises(BatchNormError, match=r"implementation='aten' cannot run inside torch.func transforms")
    with refused:
        torch.vmap(lambda x: functional.batch_norm_train(x, implementation="aten").output)(torch.randn(4, 5, 3))


def test_tensor_subclasses_see_the_call():
    class Recorded(torch.Tensor):
        calls: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    output = functional.batch_norm(torch.randn(4, 3).as_subclass(Recorded), None, None, training=True)
    assert isinstance(output, Recorded)
    assert functional.batch_norm in Recorded.calls
