"""What is left alone and why; every model here stays the same."""

import pytest
import torch
import torch.nn.functional as F
from folded import fold_and_compare, reason, with_statistics
from test_fold import Block, OwnForward, net
from torch import Tensor, nn

import batchnorm
import batchnorm.nn

X = torch.randn(4, 3, 6, 6)


def pair(norm: nn.Module | None = None, conv: nn.Module | None = None) -> nn.Module:
    return with_statistics(nn.Sequential(conv or nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4)))


def changed(tensor: str, value: float) -> nn.Module:
    model = pair()
    with torch.no_grad():
        getattr(model[1], tensor)[2] = value
    return model


def why(model: nn.Module, example: Tensor | None = None) -> str:
    (change,) = batchnorm.fold(model, example)[1]
    assert change.what == "left alone"
    return change.reason


@pytest.mark.parametrize(
    ("tensor", "value", "expected"),
    [
        ("running_mean", torch.nan, "its running_mean is not finite in 1 of 4 channels"),
        ("running_var", torch.inf, "its running_var is not finite in 1 of 4 channels"),
        ("weight", -torch.inf, "its weight is not finite in 1 of 4 channels"),
        ("bias", torch.nan, "its bias is not finite in 1 of 4 channels"),
        ("running_var", -0.25, "its running_var is negative in 1 of 4 channels, down to -0.25"),
    ],
)
def test_statistics_and_parameters_that_are_not_sound_are_refused(tensor, value, expected):
    assert why(changed(tensor, value)) == expected


def test_variance_of_zero_without_eps_is_refused():
    model = changed("running_var", 0.0)
    model[1].eps = 0.0
    assert why(model) == "variance + eps is 0 in 1 of 4 channels"


def test_statistics_that_were_never_updated_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert reason(model, X) == "its statistics were never updated: mean 0 and variance 1 are the initial ones"
    # of another framework: no counter, but statistics
    model[1].running_mean.fill_(0.5)
    _, changes = fold_and_compare(model, X)
    assert changes[0].what == "folded into 0"


class OtherForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class FrozenBatchNorm2d(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def replaced() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x * 2
    return layer


def parametrized(module: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus(), unsafe=True)
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (OtherForward(4), "has a forward of its own"),
        (FrozenBatchNorm2d(), "has a forward of its own"),
        (replaced(), "has a forward of its own"),
        (torch.ao.nn.quantized.BatchNorm2d(4), "has a forward of its own"),
        (parametrized(nn.BatchNorm2d(4)), "it is parametrized"),
        (nn.BatchNorm2d(4, track_running_stats=False), "its evaluation normalizes by the batch"),
        (nn.BatchNorm2d(4, device="meta"), "has no values of a floating point type"),
        (hooked(nn.BatchNorm2d(4)), "its hooks would see another value"),
        (batchnorm.nn.Whitening2d(4), "it mixes channels"),
        (batchnorm.nn.PerActivationBatchNorm((4, 4, 4)), "it has statistics of every activation"),
    ],
)
def test_layers_that_are_not_an_affine_map_of_channels_are_refused(layer, expected):
    assert expected in why(pair(layer))


def test_training_mode_is_refused():
    model = pair()
    model[1].train()
    assert why(model) == "it is in training mode: call model.eval()"


def test_block_that_asks_for_its_mode_must_evaluate():
    def forward(self, x):
        return self.bn1(self.conv1(x)) if self.training else self.bn1(F.relu(self.conv1(x)))

    model = net(forward)
    model.training = True
    _, changes = batchnorm.fold(model, X)
    assert changes[0].reason.endswith("the model (Net): it asks for its mode, which is training: call model.eval()")


def test_mode_of_blocks_that_do_not_ask_for_it_does_not_matter():
    model = pair().train()
    model[1].eval()
    folded, changes = batchnorm.fold(model, X)
    assert changes[0].what == "folded into 0"
    assert folded.training
    assert not folded[1].training
    torch.testing.assert_close(folded(X), model(X))


def test_dropout_that_drops_is_something_between():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4)))
    model[1].train()
    assert why(model) == "Dropout '1' precedes; its output is that of the model or block"


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (parametrized(nn.Conv2d(3, 4, 3)), "weight, bias or options of the conv2d next to it are computed"),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            "weight, bias or options of the conv2d next to it are computed",
        ),
        (hooked(nn.Conv2d(3, 4, 3)), "the hooks of '0' would see another value"),
        (hooked(nn.Sequential(nn.Conv2d(3, 4, 3))), "the hooks of '0' would see another value"),
        (nn.Conv2d(3, 4, 3, dtype=torch.float64), "it is torch.float32, '0' is torch.float64"),
        (nn.Conv2d(3, 4, 3, device="meta"), "the weight or bias of '0' is no parameter of a floating point type"),
        (nn.Conv2d(3, 6, 3), "it has 4 channels, '0' has 6"),
        (nn.MaxPool2d(2), "MaxPool2d '0' precedes"),
    ],
)
def test_neighbours_that_cannot_take_it_up_are_refused(conv, expected):
    assert expected in why(pair(conv=conv))


def test_number_of_dimensions_must_go_together():
    assert why(pair(nn.BatchNorm1d(4))) == "BatchNorm1d does not go with conv2d"


def test_unbatched_input_makes_channels_samples():
    model = with_statistics(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)))
    assert "its input has 2 dimensions, so it normalizes another axis" in reason(model, torch.randn(3, 6))


class NoBias(OwnForward):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight)


class BiasLater(OwnForward):
    def forward(self, input: Tensor) -> Tensor:
        output = F.conv2d(input, self.weight)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)


class Standardized(OwnForward):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (NoBias(3, 4, 3, bias=False), "its shift needs a bias, which '0' does not use"),
        (NoBias(3, 4, 3), "'0' has no place for a bias, or does not use it"),
        (BiasLater(3, 4, 3, bias=False), "would do something else"),
        (Standardized(3, 4, 3), "weight, bias or options of the conv2d next to it are computed"),
    ],
)
def test_own_forward_that_does_more_than_weight_and_bias_is_refused(conv, expected):
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    _, changes = fold_and_compare(with_statistics(model), X)
    assert expected in changes[0].reason
    assert changes[1].what == "folded into 3"


def asks_for_class(self, x):
    x = self.conv1(x)
    return self.bn1(x) if isinstance(self.bn1, nn.BatchNorm2d) else x * 2


def test_forward_that_asks_for_the_class_of_a_layer_is_refused():
    model = net(asks_for_class)
    assert reason(model, X, name="bn1") == "the forward of the model (Net) would do something else"


def reads_epsilon(self, x):
    return self.bn1(self.conv1(x)) * self.bn1.eps


def test_forward_that_reads_an_attribute_of_a_layer_is_refused():
    assert "would do something else" in reason(net(reads_epsilon), X, name="bn1")


FORWARDS = {
    "relu between": (lambda self, x: self.bn1(F.relu(self.conv1(x))), "relu precedes; its output is that of"),
    "written between": (lambda self, x: self.bn1(self.conv1(x).mul_(2)), "mul_ precedes"),
    "written aside": (
        lambda self, x: (lambda y: (y.mul_(2), self.bn1(y))[1])(self.conv1(x)),
        "the output of conv2d 'conv1' is used by 2 operations",
    ),
    "output used twice": (
        lambda self, x: (lambda y: y + self.bn1(y))(self.conv1(x)),
        "the output of conv2d 'conv1' is used by 2 operations",
    ),
    "weight used elsewhere": (
        lambda self, x: self.bn1(self.conv1(x)) * self.conv1.weight.sum(),
        "'conv1.weight' is used without this layer, too",
    ),
    "convolution used elsewhere": (
        lambda self, x: self.bn1(self.conv1(x)) + self.conv1(x),
        "'conv1.weight' is used without this layer, too",
    ),
    "gamma used elsewhere": (
        lambda self, x: self.bn1(self.conv1(x)) * self.bn1.weight.sum(),
        "'bn1.weight' is used outside the layer",
    ),
    "layer used twice": (
        lambda self, x: self.bn1(self.conv1(x)) + self.bn1(self.conv2(x)),
        "its calls meet different weights or options ('conv1', 'conv2')",
    ),
    "layer used with and without": (lambda self, x: self.bn1(F.relu(self.bn1(self.conv1(x)))), "relu precedes"),
    "two inputs": (lambda self, x: self.bn1(torch.cat([self.conv1(x)])), "cat precedes"),
    "input of the model": (
        lambda self, x: F.relu(self.bn1(x)),
        "its input is that of the model or block; relu follows",
    ),
    "before, used twice": (
        lambda self, x: (lambda y: self.conv1(F.pad(y, (0, -1))) + y[..., :-1])(self.bn1(x)),
        "the output of BatchNorm2d 'bn1' is used by 2 operations",
    ),
}


@pytest.mark.parametrize(("forward", "expected"), FORWARDS.values(), ids=FORWARDS)
def test_data_flow_that_is_not_one_to_one_is_refused(forward, expected):
    assert expected in reason(net(forward), X, name="bn1")


def test_reading_the_dtype_of_a_weight_is_no_use_of_it():
    model = net(lambda self, x: self.bn1(self.conv1(x * torch.ones((), dtype=x.dtype).to(self.conv1.weight.dtype))))
    model = net(lambda self, x: self.bn1(self.conv1(x.to(self.conv1.weight.dtype))))
    _, changes = fold_and_compare(model, X)
    assert changes[0].what == "folded into conv1"


def test_input_that_is_written_before_the_convolution_reads_it_is_refused():
    def forward(self, x):
        x = x + 1
        y = self.bn1(x)
        x.mul_(2)
        return self.narrow(y)

    model = net(forward, narrow=nn.Conv2d(3, 2, 1))
    assert reason(model, X, name="bn1") == "mul_ before the linear map may change its input"


def test_output_that_is_its_own_residual_is_refused():
    layer = batchnorm.nn.BatchNorm2d(3)
    model = net(lambda self, x: (lambda y: self.bn1(y, residual=y))(self.conv1(x)), bn1=layer)
    assert reason(model, X, name="bn1").startswith("its input is its residual, too")


def test_residual_or_activation_before_a_convolution_is_refused():
    layer = batchnorm.nn.BatchNorm2d(3)
    model = net(lambda self, x: self.narrow(self.bn1(x, x + 1)), bn1=layer, narrow=nn.Conv2d(3, 2, 1))
    assert "a residual is added to its output" in reason(model, X, name="bn1")
    layer.activation = "relu"
    model = net(lambda self, x: self.narrow(self.bn1(x)), bn1=layer, narrow=nn.Conv2d(3, 2, 1))
    assert reason(model, X, name="bn1") == "it applies an activation to its output"


def test_mask_is_refused():
    layer = batchnorm.nn.MaskedBatchNorm1d(3)
    model = net(lambda self, x, mask: self.bn1(self.line(x), mask=mask), bn1=layer, line=nn.Conv1d(3, 3, 1))
    _, changes = batchnorm.fold(model, (torch.randn(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)))
    assert changes[0].reason == "it is called with more than an input and a residual"


def test_domain_and_class_of_a_call_are_refused():
    domain, conditional = batchnorm.nn.DomainBatchNorm2d(3, 2), batchnorm.nn.ConditionalBatchNorm2d(3, 2)
    model = net(lambda self, x, i: self.bn1(self.conv1(x), i), bn1=domain)
    reasons = {change.name: change.reason for change in batchnorm.fold(model, (X, 1))[1]}
    assert reasons["bn1.domains.1"] == "each call says which domain normalizes"
    model = net(lambda self, x, labels: self.bn1(self.conv1(x), labels), bn1=conditional)
    reasons = {
        change.name: change.reason for change in batchnorm.fold(model, (X, torch.zeros(4, dtype=torch.int64)))[1]
    }
    assert reasons["bn1.norm"] == "gamma and beta depend on the class of each sample"


def test_layer_and_weight_inside_an_operation_of_torch_are_left_alone():
    encoder = nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)
    encoder.norm1 = nn.BatchNorm1d(4)
    model = net(lambda self, x: self.bn1(self.conv1(x)), encoder=encoder)
    assert "encoder (TransformerEncoderLayer): it is one operation" in reason(model, X, name="encoder.norm1")


class Tied(nn.Module):
    """The encoder uses the weight again, inside an operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.encoder = nn.BatchNorm1d(4), nn.TransformerEncoderLayer(4, 1, 4, dropout=0.0)
        self.linear = self.encoder.linear1

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.linear(self.norm(x)))


def test_weight_that_an_operation_of_torch_uses_is_not_changed():
    model = with_statistics(Tied())
    expected = "torch.fx cannot follow encoder (TransformerEncoderLayer): it is one operation of torch"
    assert why(model).startswith("an example is needed")
    assert reason(model, torch.randn(5, 4)) == f"it has other calls than those in the model, and {expected}"


def test_layer_that_nothing_calls_is_left_alone():
    model = net(lambda self, x: self.bn1(self.conv1(x)))
    assert reason(model, X, name="bn2") == "the forward of the model does not call it"


def test_block_that_is_called_in_two_ways_is_left_alone():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = with_statistics(Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.block(x=x) if x.sum() < torch.inf else x

    _, changes = batchnorm.fold(Two().eval(), X)
    assert [change.what for change in changes] == ["folded into block.conv1", "folded into block.conv2"]

    def flagged(self, x, flag=False):
        return self.bn1(self.conv1(x)) if flag else self.conv1(x)

    class Other(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.block(x, True) if x.sum() < torch.inf else x

    model = Other()
    model.block = net(flagged)
    assert "it is called in ways that no one graph describes" in reason(model.eval(), X, name="block.bn1")
