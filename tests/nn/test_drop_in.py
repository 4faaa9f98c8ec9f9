"""The layers against those of torch.nn: torch's own module samples, signatures, state_dict, pickle, devices."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor

import batchnorm.nn
from batchnorm import functional
from batchnorm._ops import choice
from torch_samples import LAYERS, MODULE_INFO, SAMPLES, module_error_samples, module_samples

EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)
EVERY_SAMPLE = pytest.mark.parametrize(
    ("name", "number"), [pytest.param(name, number, id=f"{name}-{desc}") for name, number, desc in SAMPLES]
)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", choice.IMPLEMENTATIONS)
SHAPES = {"BatchNorm1d": (4, 3, 5), "BatchNorm2d": (4, 3, 5, 2), "BatchNorm3d": (2, 3, 2, 3, 2)}


def ours(name: str, *args, **kwargs) -> torch.nn.Module:
    return getattr(batchnorm.nn, name)(*args, **kwargs)


def theirs(name: str, *args, **kwargs) -> torch.nn.Module:
    return getattr(torch.nn, name)(*args, **kwargs)


def pair(name: str, *args, implementation: str = "auto", **kwargs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our layer and torch's with the same random parameters."""
    mine, other = ours(name, *args, **kwargs, implementation=implementation), theirs(name, *args, **kwargs)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    mine.load_state_dict(other.state_dict())
    return mine, other


def sampled_pair(name: str, number: int, training: bool, dtype: torch.dtype, implementation: str = "auto"):
    sample = module_samples(name, training, dtype)[number]
    arguments = sample.constructor_input
    layers = pair(name, *arguments.args, **arguments.kwargs, dtype=dtype, implementation=implementation)
    (x,) = sample.forward_input.args
    return *(layer.train(training) for layer in layers), x


def step(layer: torch.nn.Module, x: Tensor) -> dict:
    """Output, every gradient and the buffers after one forward and backward."""
    x = x.detach().clone().requires_grad_()
    output = layer(x)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(output, leaves, torch.linspace(-1, 1, x.numel()).to(output).view_as(output))
    return {"output": output.detach(), "grads": grads, "buffers": dict(layer.named_buffers())}


@IMPLEMENTATIONS
@TRAINING
@pytest.mark.parametrize("dtype", MODULE_INFO["BatchNorm2d"].dtypes, ids=str)
@EVERY_SAMPLE
def test_torchs_own_samples(name, number, training, dtype, implementation):
    mine, other, x = sampled_pair(name, number, training, dtype, implementation)
    for k in range(3):
        if x.numel() == 0 and training and other.num_batches_tracked is not None:
            # the deliberate difference of an empty batch has its own test
            mine.num_batches_tracked.add_(1)
        torch.testing.assert_close(step(mine, x + k), step(other, x + k), msg=lambda m, k=k: f"step {k}: {m}")
    torch.testing.assert_close(mine.eval()(x), other.eval()(x))


@EVERY_LAYER
def test_torchs_own_error_samples(name):
    for error in module_error_samples(name):
        given = error.module_error_input
        layer = ours(name, *given.constructor_input.args, **given.constructor_input.kwargs)
        eps = layer.eps
        with pytest.raises(error.error_type, match=f"{error.error_regex}.*{eps}"):
            layer(*given.forward_input.args)
        assert layer.num_batches_tracked == 0


@TRAINING
@EVERY_SAMPLE
def test_samples_survive_pickle_and_deepcopy(name, number, training):
    mine, _, x = sampled_pair(name, number, training, torch.float32)
    for again in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)):
        assert repr(again) == repr(mine)
        torch.testing.assert_close(step(again, x), step(copy.deepcopy(mine), x))


@TRAINING
@EVERY_SAMPLE
def test_samples_take_non_contiguous_input(name, number, training):
    mine, other, x = sampled_pair(name, number, training, torch.float32)
    wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1]).copy_(x.repeat_interleave(2, -1))
    strided = wide[..., ::2]
    torch.testing.assert_close(step(mine, strided)["output"], step(other, x)["output"])
    torch.testing.assert_close(mine(strided), other(x))


@TRAINING
@pytest.mark.parametrize(("name", "memory_format"), [
    ("BatchNorm2d", torch.channels_last), ("BatchNorm3d", torch.channels_last_3d),
])  # fmt: skip
def test_memory_format_goes_through(name, memory_format, training):
    mine, other = (layer.train(training) for layer in pair(name, 3))
    x = torch.randn(SHAPES[name]).to(memory_format=memory_format).requires_grad_()
    output, expected = mine(x), other(x)
    output.sum().backward()
    assert output.stride() == expected.stride() == x.grad.stride()
    torch.testing.assert_close(output, expected)


@TRAINING
@EVERY_SAMPLE
def test_samples_have_second_derivatives(name, number, training):
    mine, _, x = sampled_pair(name, number, training, torch.float64)
    if x.numel() == 0 or x.numel() > 100:
        x = x[:, :, :2] if x.dim() == 3 else x.flatten()[: 2 * x.shape[1]].view(2, -1, *[1] * (x.dim() - 2))
    if x.numel() == 0:
        return
    mine.momentum = 0.0  # gradcheck calls the layer many times: evaluation statistics must stay
    x = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(mine, (x,))
    assert torch.autograd.gradgradcheck(mine, (x,))


@EVERY_LAYER
def test_constructor_has_torchs_signature_plus_keywords(name):
    mine = inspect.signature(getattr(batchnorm.nn, name)).parameters
    other = inspect.signature(getattr(torch.nn, name)).parameters
    assert [(p.name, p.kind, p.default) for p in list(mine.values())[: len(other)]] == [
        (p.name, p.kind, p.default) for p in other.values()
    ]
    added = list(mine.values())[len(other) :]
    assert [(p.name, p.kind, p.default) for p in added] == [
        ("activation", inspect.Parameter.KEYWORD_ONLY, None),
        ("implementation", inspect.Parameter.KEYWORD_ONLY, "auto"),
    ]


def test_functional_has_torchs_signature_plus_keywords():
    mine = inspect.signature(functional.batch_norm).parameters
    other = inspect.signature(torch.nn.functional.batch_norm).parameters
    assert [(p.name, p.kind, p.default) for p in list(mine.values())[: len(other)]] == [
        (p.name, p.kind, p.default) for p in other.values()
    ]
    assert list(mine)[len(other) :] == ["residual", "activation", "implementation"]


@EVERY_LAYER
def test_instance_of_torchs_layer(name):
    layer = ours(name, 3)
    assert isinstance(layer, getattr(torch.nn, name))
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)


@EVERY_LAYER
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_state_dict_goes_both_ways(name, affine, bias, track):
    arguments = {"affine": affine, "bias": bias, "track_running_stats": track}
    mine, other = ours(name, 3, **arguments), theirs(name, 3, **arguments)
    assert list(mine.state_dict()) == list(other.state_dict())
    assert mine.state_dict()._metadata == other.state_dict()._metadata
    for _ in range(2):
        mine(torch.randn(SHAPES[name]))
    other.load_state_dict(mine.state_dict(), strict=True)
    back = ours(name, 3, **arguments)
    back.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(dict(back.state_dict()), dict(mine.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_missing_counter_is_treated_as_in_torch(version):
    # before version 2 of the format there was no num_batches_tracked; a plain dict has no version
    for layer in (ours("BatchNorm1d", 2), theirs("BatchNorm1d", 2)):
        layer.num_batches_tracked.fill_(7)
        state = layer.state_dict()
        del state["num_batches_tracked"]
        state._metadata[""]["version"] = version
        if version == 2:
            with pytest.raises(RuntimeError, match=r'Missing key.*"num_batches_tracked"'):
                layer.load_state_dict(state)
        else:
            layer.load_state_dict(state)
            assert layer.num_batches_tracked == 7


def test_missing_running_statistics_are_an_error_only_if_strict():
    for layer in (ours("BatchNorm2d", 2), theirs("BatchNorm2d", 2)):
        state = layer.state_dict()
        del state["running_var"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"running_var"'):
            layer.load_state_dict(state)
        assert layer.load_state_dict(state, strict=False).missing_keys == ["running_var"]


def test_wrong_number_of_features_is_an_error_of_load_state_dict():
    with pytest.raises(RuntimeError, match=r"size mismatch for running_mean.*\[3\].*\[2\]"):
        ours("BatchNorm2d", 2).load_state_dict(theirs("BatchNorm2d", 3).state_dict())


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_reaches_parameters_and_buffers(name, dtype):
    mine, other = ours(name, 3, dtype=dtype), theirs(name, 3, dtype=dtype)
    assert [(k, v.dtype) for k, v in mine.state_dict().items()] == [(k, v.dtype) for k, v in other.state_dict().items()]
    torch.testing.assert_close(mine.to(torch.float32).weight, torch.ones(3))


@EVERY_LAYER
def test_layer_is_built_on_meta_and_then_reset(name):
    layer = ours(name, 3, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.randn(SHAPES[name], device="meta")).is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(dict(layer.state_dict()), dict(theirs(name, 3).state_dict()))


@EVERY_LAYER
@pytest.mark.parametrize("bad", [(3,), (4, 3, 2, 2, 2, 2)])
def test_wrong_number_of_dimensions_raises_torchs_error(name, bad):
    for build in (ours, theirs):
        with pytest.raises(ValueError, match=rf"expected .*D.* input \(got {len(bad)}D input\)"):
            build(name, 3)(torch.randn(bad))


@TRAINING
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(4, 5), "(running_mean|weight) should contain 5 elements not 3"),
        (torch.ones(4, 3).double(), "mixed dtype"),
        (torch.ones(4, 3, dtype=torch.int32), "not implemented for '(Int|torch.int32)'"),
        (torch.ones(4, 3, device="meta"), "meta"),
    ],
    ids=["features", "double", "integer", "device"],
)
def test_bad_input_raises_torchs_error_and_changes_nothing(x, message, training):
    with pytest.raises((RuntimeError, NotImplementedError)) as expected:
        theirs("BatchNorm1d", 3).train(training)(x)
    layer = ours("BatchNorm1d", 3).train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(expected.type, match=message):
        layer(x)
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(("option", "message"), [
    ({"activation": "swish"}, "unknown activation 'swish': expected None or one of relu, relu6"),
    ({"implementation": "cudnn"}, "unknown implementation 'cudnn': expected one of auto"),
])  # fmt: skip
def test_unknown_option_is_refused_by_the_constructor(option, message):
    with pytest.raises(ValueError, match=message):
        ours("BatchNorm1d", 3, **option)


@EVERY_LAYER
def test_repr_is_torchs_plus_what_is_ours(name):
    layer = ours(name, 3, momentum=None, activation="relu", bias=False)
    torchs = repr(theirs(name, 3, momentum=None, bias=False))
    assert repr(layer) == torchs[:-1] + ", activation=relu, mode=training, implementation=auto)"
    layer.eval()(torch.randn(SHAPES[name]))
    assert repr(layer).endswith("mode=evaluation, implementation=auto (last call: kernel))")


def test_explain_names_implementation_and_reason():
    layer, x = ours("BatchNorm1d", 3, implementation="reference"), torch.randn(4, 3)
    assert batchnorm.nn.explain(layer, x) == ("reference", "implementation='reference' was asked for")
    with pytest.raises(TypeError, match=r"of batchnorm.nn, got torch.nn.modules.batchnorm.BatchNorm1d"):
        batchnorm.nn.explain(theirs("BatchNorm1d", 3), x)
    with pytest.raises(ValueError, match="got 4D input"):
        batchnorm.nn.explain(layer, torch.randn(1, 3, 2, 2))


@IMPLEMENTATIONS
@TRAINING
@EVERY_LAYER
def test_residual_and_activation_equal_separate_modules(name, training, implementation):
    x, residual = torch.randn(2, *SHAPES[name])
    for activation, module in (("relu", torch.nn.ReLU()), ("hardswish", torch.nn.Hardswish()), (None, lambda z: z)):
        mine, other = pair(name, 3)
        mine.activation, mine.implementation = activation, implementation
        mine.train(training)
        other.train(training)
        for k in range(2):
            xs = [x.clone().requires_grad_() for _ in range(2)]
            rs = [residual.clone().requires_grad_() for _ in range(2)]
            output, expected = mine(xs[0], residual=rs[0]), module(other(xs[1]) + rs[1])
            output.pow(2).sum().backward()
            expected.pow(2).sum().backward()
            torch.testing.assert_close(
                (output, xs[0].grad, rs[0].grad),
                (expected, xs[1].grad, rs[1].grad),
                msg=lambda m, k=k: f"step {k}: {m}",
            )
        grads = [[p.grad for p in layer.parameters()] for layer in (mine, other)]
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()))


def test_evaluation_gradient_has_no_batch_terms():
    mine = ours("BatchNorm1d", 3).eval()
    mine.running_var.fill_(4.0)
    x = torch.randn(5, 3, requires_grad=True)
    grad_output = torch.randn(5, 3)
    mine(x).backward(grad_output)
    torch.testing.assert_close(x.grad, grad_output * mine.weight.detach() / (4 + mine.eps) ** 0.5)


def test_frozen_layer_has_a_gradient_for_the_input_alone():
    mine = ours("BatchNorm2d", 3, activation="silu").eval().requires_grad_(False)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    mine(x).sum().backward()
    assert x.grad is not None
    assert mine.weight.grad is mine.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@TRAINING
def test_autocast_leaves_the_layer_in_the_dtype_of_its_input(dtype, training):
    mine, other = (layer.train(training) for layer in pair("BatchNorm2d", 3))
    for x in (torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2, dtype=dtype)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, expected = mine(x), other(x)
        assert output.dtype == expected.dtype == x.dtype
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()))


def test_autocast_network_equals_torchs():
    mine, other = pair("BatchNorm2d", 4)
    conv, x = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    results = []
    for layer in (mine, other):
        conv.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(conv(x))
        output.float().square().sum().backward()
        results.append((output, conv.weight.grad.clone(), layer.weight.grad, layer.running_var))
    # gradients passed through bfloat16
    torch.testing.assert_close(*results, rtol=torch.finfo(torch.bfloat16).eps, atol=torch.finfo(torch.bfloat16).eps)


def test_parametrized_weight_is_used():
    class Positive(torch.nn.Module):
        def forward(self, raw: Tensor) -> Tensor:
            return raw.exp()

    x = torch.randn(4, 3)
    mine, other = pair("BatchNorm1d", 3)
    for layer in (mine, other):
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
    torch.testing.assert_close(mine(x), other(x))
    mine(x).square().sum().backward()
    assert mine.parametrizations.weight.original.grad is not None
