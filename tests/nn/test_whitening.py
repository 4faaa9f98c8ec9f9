"""The whitening layers: what running statistics become, what evaluation does with them, and what changes nothing."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from batchnorm import reference
from batchnorm.nn import BatchNorm2d, Whitening1d, Whitening2d, Whitening3d
from batchnorm.relatives import whitening
from tolerance import assert_within_budget, results_and_gradients

methods = pytest.mark.parametrize("method", whitening.METHODS)
STATISTICS = ("running_mean", "running_cov", "num_batches_tracked")
LAYERS = {Whitening1d: [(5, 4), (3, 4, 5)], Whitening2d: [(3, 4, 5, 3)], Whitening3d: [(2, 4, 3, 2, 2)]}
shapes = pytest.mark.parametrize(("layer", "shape"), [(layer, s) for layer, ss in LAYERS.items() for s in ss])


def statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {name: layer.state_dict()[name].clone() for name in STATISTICS}


def expected_statistics(batches: list[Tensor], momentum: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Running mean and covariance after these batches, in groups of two."""
    mean, cov = torch.zeros(4, dtype=dtype), torch.eye(2, dtype=dtype).repeat(2, 1, 1)
    for number, batch in enumerate(batches, 1):
        _, batch_mean, batch_cov, count = whitening.whiten_train(batch.to(dtype), group_size=2)
        factor = 1 / number if momentum is None else momentum
        mean = reference.running_average(mean, batch_mean, factor)
        cov = reference.running_average(cov, reference.var_unbiased(batch_cov, count), factor)
    return mean, cov


@shapes
@pytest.mark.parametrize("momentum", [0.1, None, 1.0, 0.0])
@pytest.mark.parametrize("steps", [0, 1, 2, 10])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_and_evaluation_after_steps(layer, shape, momentum: float | None, steps: int, offset: float):
    one = layer(4, momentum=momentum, group_size=2)
    batches = [torch.randn(shape) + offset for _ in range(steps)]
    for batch in batches:
        one(batch)
    assert one.num_batches_tracked == steps
    state = [expected_statistics(batches, momentum, dtype) for dtype in (torch.float32, torch.float64)]
    for name, base, exact in zip(STATISTICS[:2], *state, strict=True):
        assert_within_budget(getattr(one, name), [base], exact, name)
    x = torch.randn(shape) + offset
    baseline = whitening.whiten_inference(x, one.running_mean, one.running_cov)
    exact = whitening.whiten_inference(x.double(), one.running_mean.double(), one.running_cov.double())
    assert_within_budget(one.eval()(x), [baseline], exact)


@methods
def test_evaluation_before_training_changes_nothing_but_eps(method: str):
    x = torch.randn(5, 4)
    layer = Whitening1d(4, method=method, group_size=2, iterations=20, eps=1e-12).eval()
    torch.testing.assert_close(layer(x), x.flip(1).view(5, 2, 2).flip(1).flatten(1) if method == "pca" else x)


@methods
def test_evaluation_whitens_the_population_not_the_average_batch(method: str):
    # batches whose covariances differ: the average of their inverse roots would be another matrix
    layer = Whitening1d(2, momentum=None, method=method, iterations=60, eps=1e-12, affine=False)
    batches = [torch.randn(1000, 2) @ torch.randn(2, 2) for _ in range(8)]
    for batch in batches:
        layer(batch - batch.mean(0))
    centered = torch.cat([batch - batch.mean(0) for batch in batches])
    torch.testing.assert_close(torch.cov(layer.eval()(centered).T), torch.eye(2), atol=2e-3, rtol=0)


@methods
@shapes
def test_gradients_in_training_evaluation_and_frozen(method: str, layer, shape):
    for training in (True, False):
        one = layer(4, method=method, group_size=2).double().train(training)
        one(torch.randn(shape).double())
        nn.init.normal_(one.weight)
        state = one.running_mean.clone(), one.running_cov.clone()
        x, grad_output = torch.randn(shape).double(), torch.randn(shape).double()

        def plain(x, weight, bias, state=state, training=training):
            if training:
                return [whitening.whiten_train(x, weight, bias, method=method, group_size=2).output]
            return [whitening.whiten_inference(x, *state, weight, bias, method=method)]

        expected = results_and_gradients(plain, grad_output, x, one.weight, one.bias)
        leaf = x.clone().requires_grad_()
        output = one(leaf)
        gradients = torch.autograd.grad(output, [leaf, one.weight, one.bias], grad_output)
        torch.testing.assert_close([output.detach(), *gradients], expected)
        if not training:
            one.requires_grad_(False)
            (grad,) = torch.autograd.grad(one(leaf), leaf, grad_output)
            torch.testing.assert_close(grad, expected[1])


@methods
def test_without_statistics_evaluation_uses_the_batch(method: str):
    layer, x = Whitening1d(4, track_running_stats=False, method=method), torch.randn(9, 4)
    assert [layer.running_mean, layer.running_cov, layer.num_batches_tracked] == [None, None, None]
    torch.testing.assert_close(layer.eval()(x), Whitening1d(4, method=method)(x))


@pytest.mark.parametrize(("affine", "bias"), [(False, True), (True, False)])
def test_parameters_are_as_asked(affine: bool, bias: bool):
    layer = Whitening1d(4, affine=affine, bias=bias)
    assert [name for name, _ in layer.named_parameters()] == (["weight"] if affine else [])
    torch.testing.assert_close(layer(torch.arange(8.0).view(2, 4).square()).sum(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_state_is_that_of_batch_norm_but_for_the_covariance():
    layer = Whitening2d(6, group_size=3)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "weight": (6,), "bias": (6,), "running_mean": (6,), "running_cov": (2, 3, 3), "num_batches_tracked": (),
    }  # fmt: skip
    names = [name.replace("running_var", "running_cov") for name in BatchNorm2d(6).state_dict()]
    assert list(shapes) == names


def test_a_saved_layer_evaluates_as_before():
    trained, x = Whitening1d(4, group_size=2), torch.randn(9, 4)
    for _ in range(3):
        trained(torch.randn(9, 4) * 3 + 1)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    loaded = Whitening1d(4, group_size=2)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.eval()(x), trained.eval()(x))


def test_a_layer_of_another_group_size_is_not_loaded():
    with pytest.raises(
        RuntimeError, match=r"running_cov: .*shape torch.Size\(\[2, 2, 2\]\).*torch.Size\(\[1, 4, 4\]\)"
    ):
        Whitening1d(4).load_state_dict(Whitening1d(4, group_size=2).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_layers_of_another_dtype(dtype: torch.dtype):
    layer = Whitening1d(4, dtype=dtype)
    output = layer(torch.randn(9, 4, dtype=dtype))
    assert {output.dtype, layer.running_cov.dtype, layer.weight.dtype} == {dtype}
    assert layer.eval()(output).dtype == dtype


def test_a_layer_is_made_on_its_device():
    layer = Whitening1d(4, device="meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(layer.state_dict(), Whitening1d(4).state_dict())


NOTHING_LEARNED = {
    "an empty batch": torch.zeros(0, 4),
    "inf": torch.tensor([[1.0, torch.inf, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),
    "NaN": torch.tensor([[1.0, torch.nan, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),
    "a covariance beyond float32": torch.eye(4) * 1e30,
}


@methods
@pytest.mark.parametrize("batch", NOTHING_LEARNED)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_without_finite_statistics_leaves_them(method: str, batch: str, momentum: float | None):
    layer = Whitening1d(4, momentum=momentum, method=method)
    layer(torch.randn(9, 4))
    before = statistics(layer)
    assert layer(NOTHING_LEARNED[batch]).shape == NOTHING_LEARNED[batch].shape
    torch.testing.assert_close(statistics(layer), before, rtol=0, atol=0)


REFUSED = {
    "one value": (Whitening1d, ValueError, "more than 1 value per channel", torch.randn(1, 4)),
    "two dimensions": (Whitening2d, ValueError, r"expected 4D input \(got 2D input\)", torch.randn(3, 4)),
    "four dimensions": (Whitening1d, ValueError, r"expected 2D or 3D input \(got 4D input\)", torch.randn(3, 4, 2, 2)),
    "another C": (Whitening1d, RuntimeError, "running_mean should contain 3 elements not 4", torch.randn(5, 3)),
    "another dtype": (
        Whitening1d,
        RuntimeError,
        "mixed dtype: running_mean is torch.float32",
        torch.randn(5, 4).double(),
    ),
    "no tensor": (Whitening1d, TypeError, "input must be Tensor, not list", [[1.0]]),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_forward_that_fails_leaves_the_statistics(case: str, momentum: float | None):
    layer, error, message, input = REFUSED[case]
    one = layer(4, momentum=momentum)
    before = statistics(one)
    with pytest.raises(error, match=message):
        one(input)
    torch.testing.assert_close(statistics(one), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "svd"}, "unknown method 'svd'"),
        ({"group_size": 3}, "group_size must divide the number of features, but got 3 for 4 features"),
        ({"eps": 0.0}, "eps must be positive during training, but got 0.0"),
        ({"iterations": 0}, "iterations must be at least 1, but got 0"),
        ({"shrinkage": -0.1}, "shrinkage must lie between 0 and 1, but got -0.1"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_when_the_layer_is_made(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Whitening1d(4, **options)


def test_repr_says_what_the_layer_does():
    assert repr(Whitening2d(64, group_size=16, method="newton_schulz").eval()) == (
        "Whitening2d(64, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
        "method=newton_schulz, group_size=16, iterations=5, shrinkage=0.0, mode=evaluation)"
    )


def test_running_statistics_hold_no_graph():
    layer = Whitening1d(4)
    layer(torch.randn(9, 4, requires_grad=True))
    assert not layer.running_cov.requires_grad


@methods
@pytest.mark.parametrize("training", [True, False])
def test_compiled_it_is_the_same(method: str, training: bool):
    layer = Whitening1d(4, group_size=2, method=method, affine=False).train(training)
    compiled, x = copy.deepcopy(layer), torch.randn(50, 4)
    function = torch.compile(compiled, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(function(x), layer(x))
    torch.testing.assert_close(statistics(compiled), statistics(layer))
    assert not compiled.running_cov.requires_grad


@methods
def test_evaluation_is_exported(method: str):
    layer, x = Whitening1d(4, method=method).eval(), torch.randn(9, 4)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@methods
def test_vmap_whitens_each_sample_by_itself(method: str):
    layer, x = Whitening1d(4, method=method, track_running_stats=False), torch.randn(3, 9, 4)
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(one) for one in x]))


def test_fx_traces_a_layer_as_one_node():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Whitening2d(4)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(traced(x), model(x))
