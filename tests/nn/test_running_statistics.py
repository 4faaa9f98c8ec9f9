"""What happens to running_mean, running_var and num_batches_tracked, step by step, here and in torch.nn."""

import copy

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import batchnorm.nn
from batchnorm import reference
from batchnorm._ops import choice

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", choice.IMPLEMENTATIONS)
BOTH = pytest.mark.parametrize("home", [batchnorm.nn, torch.nn], ids=["ours", "torch"])


def batches(k: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """k batches of different sizes, far from the initial statistics."""
    return [torch.randn(2 + i % 3, 3, 4, dtype=dtype) * 2 + 5 for i in range(k)]


def averaged(batches: list[Tensor], momentum: float | None) -> tuple[Tensor, Tensor]:
    """Running statistics by the formulas of the reference."""
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for step, x in enumerate(batches, start=1):
        new = reference.batch_norm_train(x)
        weight = 1 / step if momentum is None else momentum
        mean = reference.running_average(mean, new.mean, weight)
        var = reference.running_average(var, reference.var_unbiased(new.var, new.count), weight)
    return mean, var


def buffers(layer: torch.nn.Module) -> list[Tensor | None]:
    return [copy.deepcopy(getattr(layer, name)) for name in ("running_mean", "running_var", "num_batches_tracked")]


@IMPLEMENTATIONS
@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, None])
@pytest.mark.parametrize("steps", [0, 1, 2, 10])
def test_statistics_and_evaluation_output_after_k_steps(steps, momentum, implementation):
    data = batches(steps)
    layer = batchnorm.nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64, implementation=implementation)
    torchs = torch.nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    for x in data:
        layer(x)
        torchs(x)
    mean, var = averaged(data, momentum)
    torch.testing.assert_close((layer.running_mean, layer.running_var), (mean, var))
    torch.testing.assert_close(buffers(layer), buffers(torchs))
    assert layer.num_batches_tracked == steps
    x = torch.randn(2, 3, 4).double()
    torch.testing.assert_close(layer.eval()(x), reference.batch_norm_inference(x, mean, var))


@BOTH
def test_running_var_is_unbiased_but_normalization_is_not(home):
    x = torch.tensor([[0.0], [2.0]])
    layer = home.BatchNorm1d(1, momentum=1.0, eps=1e-12)
    assert torch.equal(layer(x).detach(), torch.tensor([[-1.0], [1.0]]))  # biased: var is 1
    assert layer.running_var.item() == 2.0  # times m / (m - 1)


@BOTH
def test_momentum_is_the_weight_of_the_new_batch(home):
    layer = home.BatchNorm1d(1, momentum=0.25)
    layer(torch.tensor([[3.0], [5.0]]))
    assert layer.running_mean.item() == 1.0


@BOTH
def test_momentum_none_averages_batches_without_regard_to_their_size(home):
    # mean 7, not the 9 of all six values; variance 4.33, not the 42.8 of all six
    layer = home.BatchNorm1d(1, momentum=None)
    for values in ([0.0, 2.0], [10.0, 12.0, 14.0, 16.0]):
        layer(torch.tensor(values)[:, None])
    assert layer.running_mean.item() == pytest.approx(7.0)
    assert layer.running_var.item() == pytest.approx((2 + 20 / 3) / 2)


@BOTH
def test_momentum_none_goes_on_from_the_loaded_counter(home):
    trained = home.BatchNorm1d(1, momentum=None)
    trained.running_mean.fill_(5.0)
    trained.num_batches_tracked.fill_(3)
    for counter, expected in ((3, 4.0), (0, 1.0)):  # without a counter the first batch overwrites everything
        layer = home.BatchNorm1d(1, momentum=None)
        layer.load_state_dict(trained.state_dict() | {"num_batches_tracked": torch.tensor(counter)})
        layer(torch.tensor([[0.0], [2.0]]))
        assert layer.running_mean.item() == pytest.approx(expected)


@BOTH
def test_share_of_the_initial_statistics_after_ten_steps_is_35_percent(home):
    layer = home.BatchNorm1d(1)
    layer.running_mean.fill_(1.0)
    for _ in range(10):
        layer(torch.tensor([[-1.0], [1.0]]))
    assert layer.running_mean.item() == pytest.approx(0.9**10)


@BOTH
def test_momentum_zero_counts_without_moving(home):
    layer = home.BatchNorm1d(3, momentum=0.0)
    layer(torch.randn(4, 3) + 7)
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.num_batches_tracked == 1


# Where we differ from torch.nn on purpose: the list in the docstring of BatchNorm1d


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.randn(1, 3), "more than 1 value per channel.*\\[1, 3\\]"),
        (torch.randn(4, 3).double(), "mixed dtype"),
        (torch.ones(4, 3, dtype=torch.long), "not implemented for '(Long|torch.int64)'"),
    ],
    ids=["one_value", "dtype", "integer"],
)
def test_failing_forward_leaves_the_counter_though_torch_counts_it(bad, error, implementation):
    torchs, layer = torch.nn.BatchNorm1d(3), batchnorm.nn.BatchNorm1d(3, implementation=implementation)
    for each in (torchs, layer):
        with pytest.raises((ValueError, RuntimeError), match=error):
            each(bad)
    assert torchs.num_batches_tracked == 1
    torch.testing.assert_close(buffers(layer), buffers(batchnorm.nn.BatchNorm1d(3)))


@IMPLEMENTATIONS
@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batch_leaves_the_counter_though_torch_counts_it(momentum, implementation):
    torchs = torch.nn.BatchNorm2d(3, momentum=momentum)
    layer = batchnorm.nn.BatchNorm2d(3, momentum=momentum, implementation=implementation)
    for each in (torchs, layer):
        output = each(torch.randn(0, 3, 2, 2))
        output.sum().backward()
        assert output.shape == (0, 3, 2, 2)
        assert torch.equal(each.weight.grad, torch.zeros(3))
    assert torchs.num_batches_tracked == 1
    torch.testing.assert_close(buffers(layer), buffers(batchnorm.nn.BatchNorm2d(3)))
    assert layer.eval()(torch.randn(0, 3, 2, 2)).shape == (0, 3, 2, 2)


@IMPLEMENTATIONS
def test_momentum_zero_keeps_statistics_from_inf_though_torch_makes_them_nan(implementation):
    x = torch.tensor([[1.0], [float("inf")]])
    torchs = torch.nn.BatchNorm1d(1, momentum=0.0)
    layer = batchnorm.nn.BatchNorm1d(1, momentum=0.0, implementation=implementation)
    torch.testing.assert_close(layer(x), torchs(x), equal_nan=True)
    assert torchs.running_mean.isnan().all()
    torch.testing.assert_close(buffers(layer)[:2], [torch.zeros(1), torch.ones(1)])


@BOTH
def test_one_infinite_sample_poisons_the_statistics_for_ever(home):
    layer = home.BatchNorm1d(1)
    layer(torch.tensor([[1.0], [float("inf")]]))
    for _ in range(3):
        layer(torch.randn(4, 1))
    assert layer.running_mean.isinf().all()
    assert layer.running_var.isnan().all()


def test_torch_jit_script_is_not_supported_but_trace_is():
    layer = batchnorm.nn.BatchNorm1d(3).eval()
    with (
        pytest.warns(DeprecationWarning, match="torch.jit.script"),
        pytest.raises(torch.jit.frontend.NotSupportedError, match=r"batchnorm/nn/"),
    ):
        torch.jit.script(layer)


def test_conversion_to_sync_batchnorm_drops_the_activation():
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(batchnorm.nn.BatchNorm2d(3, activation="relu"))
    assert type(converted) is torch.nn.SyncBatchNorm
    assert not hasattr(converted, "activation")


def test_torchs_fusion_drops_the_activation():
    conv, layer = torch.nn.Conv2d(3, 3, 1).eval(), batchnorm.nn.BatchNorm2d(3, activation="relu").eval()
    x = torch.randn(2, 3, 4, 4)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, layer)(x)
    torch.testing.assert_close(fused.relu(), layer(conv(x)))
    assert (fused < 0).any()


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@IMPLEMENTATIONS
def test_half_precision_statistics_are_rounded_once_per_step(dtype, implementation):
    if implementation == "kernel" and dtype == torch.float16:
        implementation = "auto"
    layer = batchnorm.nn.BatchNorm1d(50, dtype=dtype, implementation=implementation)
    torchs = torch.nn.BatchNorm1d(50, dtype=dtype)
    mean, var = torch.zeros(50, dtype=dtype), torch.ones(50, dtype=dtype)
    for _ in range(20):
        x = (torch.randn(32, 50) * 3 + 2).to(dtype)
        layer(x)
        torchs(x)
        mean = reference.running_average(mean.float(), x.float().mean(0), 0.1).to(dtype)
        var = reference.running_average(var.float(), x.float().var(0), 0.1).to(dtype)
    one_unit_in_the_last_place = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.running_mean, mean, rtol=one_unit_in_the_last_place, atol=0)
    torch.testing.assert_close(layer.running_var, var, rtol=one_unit_in_the_last_place, atol=0)
    if dtype == torch.bfloat16:
        # torch rounds every product on the way
        off = (torchs.running_mean.float() - mean.float()).abs() / mean.float().abs()
        assert (off > one_unit_in_the_last_place).any()


@BOTH
def test_small_momentum_never_moves_bfloat16_statistics(home):
    # 0.001 of the way from 1 to 2 is below half a unit in the last place of bfloat16
    layer = home.BatchNorm1d(1, momentum=0.001, dtype=torch.bfloat16)
    layer.running_mean.fill_(1.0)
    for _ in range(20):
        layer(torch.tensor([[1.0], [3.0]], dtype=torch.bfloat16))
    assert layer.running_mean.item() == 1.0


@IMPLEMENTATIONS
def test_float32_layer_takes_half_precision_input_and_keeps_float32_statistics(implementation):
    layer, torchs = batchnorm.nn.BatchNorm1d(3, implementation=implementation), torch.nn.BatchNorm1d(3)
    x = torch.randn(16, 3).bfloat16()
    output = layer(x)
    torch.testing.assert_close(output, torchs(x), rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    assert output.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(buffers(layer), buffers(torchs))


def test_half_precision_parameters_with_float32_statistics_train_and_evaluate():
    layer = batchnorm.nn.BatchNorm1d(3, dtype=torch.bfloat16)
    layer.running_mean, layer.running_var = layer.running_mean.float(), layer.running_var.float()
    x = torch.randn(16, 3).bfloat16()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.running_mean, 0.1 * x.float().mean(0))
    assert layer.weight.grad.dtype == torch.bfloat16
    assert layer.eval()(x).dtype == torch.bfloat16


# Flags


@BOTH
def test_layer_without_statistics_normalizes_by_the_batch_in_evaluation_too(home):
    layer = home.BatchNorm1d(3, track_running_stats=False).eval()
    assert buffers(layer) == [None, None, None]
    x = torch.randn(8, 3) + 4
    torch.testing.assert_close(layer(x), reference.batch_norm_train(x).output)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\[1, 3\]"):
        layer(x[:1])


@BOTH
def test_flag_turned_off_later_stops_updates_but_evaluation_uses_the_buffers(home):
    layer = home.BatchNorm1d(3)
    layer(torch.randn(8, 3))
    before = buffers(layer)
    layer.track_running_stats = False
    layer(torch.randn(8, 3) + 4)
    torch.testing.assert_close(buffers(layer), before)
    x = torch.randn(1, 3)
    torch.testing.assert_close(layer.eval()(x), reference.batch_norm_inference(x, before[0], before[1]))


@BOTH
def test_flag_turned_on_later_has_no_buffers_to_update(home):
    layer = home.BatchNorm1d(3, track_running_stats=False)
    layer.track_running_stats = True
    layer(torch.randn(8, 3))
    assert buffers(layer) == [None, None, None]


@BOTH
def test_buffers_set_to_none_make_evaluation_use_the_batch(home):
    layer = home.BatchNorm1d(3).eval()
    layer.running_mean = layer.running_var = None
    x = torch.randn(8, 3) + 4
    torch.testing.assert_close(layer(x), reference.batch_norm_train(x).output)


@BOTH
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_only_one_statistic_is_an_error_in_evaluation(home, missing):
    layer = home.BatchNorm1d(3).eval()
    setattr(layer, missing, None)
    with pytest.raises(RuntimeError, match=f"{missing} must be defined in evaluation mode"):
        layer(torch.randn(8, 3))


@BOTH
def test_negative_running_var_gives_nan_without_a_message(home):
    layer = home.BatchNorm1d(1).eval()
    layer.running_var.fill_(-1.0)
    assert layer(torch.ones(2, 1)).isnan().all()


@BOTH
def test_counter_is_updated_in_place(home):
    # DDP broadcasts the buffer object it saw first
    layer = home.BatchNorm1d(3)
    counter, mean = layer.num_batches_tracked, layer.running_mean
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked is counter
    assert layer.running_mean is mean
    assert counter == 1


def test_statistics_move_under_no_grad_and_inference_mode():
    layer, x = batchnorm.nn.BatchNorm1d(3), torch.randn(4, 3)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            layer(x)
    assert layer.num_batches_tracked == 2


# torch's tools


@BOTH
def test_update_bn_recomputes_statistics(home):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), home.BatchNorm1d(3))
    averaged_model = AveragedModel(model)
    data = [torch.randn(8, 3) for _ in range(4)]
    model(data[0] + 9)
    averaged_model.update_parameters(model)
    update_bn(data, averaged_model)
    with torch.no_grad():
        seen = [model[0](x) for x in data]
    torch.testing.assert_close(averaged_model.module[1].running_mean, torch.stack(seen).mean((0, 1)))
    assert averaged_model.module[1].num_batches_tracked == 4


@BOTH
def test_functional_call_updates_the_given_buffers(home):
    layer = home.BatchNorm1d(3)
    given = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    given["weight"] = torch.full((3,), 2.0)
    x = torch.randn(8, 3)
    output = torch.func.functional_call(layer, given, (x,))
    torch.testing.assert_close(output, 2 * reference.batch_norm_train(x).output)
    assert given["num_batches_tracked"] == 1
    assert layer.num_batches_tracked == 0


def test_replace_all_batch_norm_modules_removes_the_statistics():
    model = torch.nn.Sequential(batchnorm.nn.BatchNorm1d(3, activation="relu"))
    torch.func.replace_all_batch_norm_modules_(model)
    assert buffers(model[0]) == [None, None, None]
    x = torch.randn(5, 4, 3)
    torch.testing.assert_close(torch.vmap(model)(x), torch.stack([model(one) for one in x]))


@BOTH
def test_vmap_over_a_training_layer_with_statistics_is_a_clear_error(home):
    layer = home.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match=r"running.*(vmap|batched)(.|\n)*track_running_stats"):
        torch.vmap(layer)(torch.randn(5, 4, 3))
    torch.testing.assert_close(buffers(layer)[:2], [torch.zeros(3), torch.ones(3)])
    assert layer.num_batches_tracked == (0 if home is batchnorm.nn else 1)


@BOTH
def test_vmap_over_an_evaluating_layer(home):
    layer, x = home.BatchNorm1d(3).eval(), torch.randn(5, 4, 3)
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(one) for one in x]))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_per_layer_grad_transform_equals_autograd(training):
    layer, x = batchnorm.nn.BatchNorm1d(3, activation="silu").train(training), torch.randn(4, 3)
    parameters, held = dict(layer.named_parameters()), dict(layer.named_buffers())

    def loss(parameters, x):
        return torch.func.functional_call(layer, (parameters, copy.deepcopy(held)), (x,)).square().sum()

    grads = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    torch.testing.assert_close(tuple(grads.values()), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_jvp_of_an_evaluating_layer():
    layer = batchnorm.nn.BatchNorm1d(3, dtype=torch.float64).eval()
    x, tangent = torch.randn(2, 4, 3, dtype=torch.float64)
    _, derivative = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(derivative, tangent / (1 + layer.eps) ** 0.5)


# Activation checkpointing


@BOTH
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_keeps_gradients_and_counts_twice(home, use_reentrant):
    layer = home.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    plain = copy.deepcopy(layer)
    expected = torch.autograd.grad(plain(x).pow(3).sum(), (x, *plain.parameters()))
    # the power saves the layer's output, so the second forward runs through the whole layer
    checkpoint(lambda x: layer(x).pow(3), x, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close((x.grad, layer.weight.grad, layer.bias.grad), expected)
    assert plain.num_batches_tracked == 1
    assert layer.num_batches_tracked == 2
    torch.testing.assert_close(layer.running_mean, plain.running_mean * (1 + 0.9))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_takes_residual_and_activation(use_reentrant):
    layer = batchnorm.nn.BatchNorm2d(3, activation="gelu")
    x, residual = (torch.randn(4, 3, 2, 2, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(layer(x, residual).pow(3).sum(), (x, residual))
    checkpoint(layer, x, residual, use_reentrant=use_reentrant).pow(3).sum().backward()
    torch.testing.assert_close((x.grad, residual.grad), expected)
