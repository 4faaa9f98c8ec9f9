"""What is absorbed and what is left alone; every model here stays the same, in both modes, forward and backward."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from equivalence import assert_same_model
from torch import Tensor, nn

import batchnorm
from batchnorm.reference import ACTIVATIONS
from batchnorm.surgery.activations import activation_of_module

C = 3


class Net(nn.Module):
    """Convolutions, layers and activations to build small models of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.flag = 1
        self.scale = nn.Parameter(torch.ones(C, 1, 1))
        self.register_buffer("calls", torch.zeros(()))


def net(forward, **attributes) -> nn.Module:
    model = type("Net", (Net,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def converted(model: nn.Module, *inputs: Tensor, **kwargs) -> dict[str, tuple[str, str]]:
    """Convert, compare with the original, and give what happened to each layer."""
    original = copy.deepcopy(model)
    _, changes = batchnorm.convert(model, **kwargs)
    for parameter in model.parameters():
        assert not parameter.is_meta
    assert_same_model(original, model, *(inputs or (torch.randn(4, C, 6, 6),)))
    return {change.name: (change.what, change.reason) for change in changes}


def residual_block(self, x):
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    out += x
    return self.relu(out)


FUNCTIONAL = {
    "F.relu": lambda self, x: F.relu(self.bn1(x)),
    "F.relu in place": lambda self, x: F.relu(self.bn1(x), inplace=True),
    "F.relu by position": lambda self, x: F.relu(self.bn1(x), True),
    "torch.relu": lambda self, x: torch.relu(self.bn1(x)),
    "torch.relu_": lambda self, x: torch.relu_(self.bn1(x)),
    "method": lambda self, x: self.bn1(x).relu(),
    "method in place": lambda self, x: self.bn1(x).relu_(),
    "module": lambda self, x: self.relu(self.bn1(x)),
    "module in place": lambda self, x: self.relu_(self.bn1(x)),
    "by name": lambda self, x: F.relu(input=self.bn1(input=x)),
}


@pytest.mark.parametrize("forward", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_every_spelling_of_an_activation_is_absorbed(forward):
    assert converted(net(forward))["bn1"] == ("absorbed relu", "")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_absorbed(name):
    f = ACTIVATIONS[name]
    assert converted(net(lambda self, x: f(self.bn1(x))))["bn1"][0] == f"absorbed {name}"


ADDITIONS = {
    "right": lambda self, x: F.relu(self.bn1(self.conv1(x)) + x),
    "left": lambda self, x: F.relu(x + self.bn1(self.conv1(x))),
    "torch.add": lambda self, x: F.relu(torch.add(self.bn1(self.conv1(x)), x)),
    "torch.add, alpha 1": lambda self, x: F.relu(torch.add(x, other=self.bn1(self.conv1(x)), alpha=1)),
    "method": lambda self, x: self.bn1(self.conv1(x)).add(x).relu(),
    "method in place": lambda self, x: self.bn1(self.conv1(x)).add_(x).relu_(),
    "own input": lambda self, x: F.relu(self.bn1(x) + x),
}


@pytest.mark.parametrize("forward", ADDITIONS.values(), ids=ADDITIONS)
def test_every_spelling_of_an_addition_is_absorbed(forward):
    assert converted(net(forward))["bn1"] == ("absorbed add + relu", "")


def test_residual_block_with_one_activation_module():
    changes = converted(net(residual_block))
    assert changes["bn1"] == ("absorbed relu", "")
    assert changes["bn2"] == ("absorbed add + relu", "")


def test_shared_activation_that_is_not_idempotent_is_absorbed_call_by_call():
    model = net(lambda self, x: self.act(self.conv2(self.act(self.bn1(self.conv1(x))))), act=nn.SiLU())
    assert converted(model)["bn1"] == ("absorbed silu", "")


def test_shared_layer_absorbs_where_the_activation_follows():
    model = net(lambda self, x: self.relu(self.bn1(self.conv1(x))) + self.conv2(self.bn1(x)))
    assert converted(model)["bn1"] == ("absorbed relu", "in other calls: Conv2d 'conv2' follows")


def test_layers_of_both_operands():
    model = net(lambda self, x: F.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x))))
    changes = converted(model)
    assert changes["bn1"] == ("absorbed add + relu", "")
    assert changes["bn2"] == ("converted", "the layer of the other operand absorbs the addition")


def test_residual_that_is_itself_fused():
    model = net(lambda self, x: F.relu(self.bn2(self.conv2(x)) + F.silu(self.bn1(self.conv1(x)))))
    assert [what for what, _ in converted(model).values()] == ["absorbed silu", "absorbed add + relu"]


def test_nested_blocks_pass_their_output_on():
    inner = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Identity(), nn.Dropout(0.0))
    model = net(lambda self, x: torch.relu(self.inner(x) + x), inner=nn.Sequential(inner))
    assert converted(model)["inner.0.1"] == ("absorbed add + relu", "")


def test_one_and_three_dimensions():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
    assert converted(model, torch.randn(8, 3))["1"] == ("absorbed tanh", "")
    assert converted(nn.Sequential(nn.BatchNorm3d(3), nn.ELU()), torch.randn(2, 3, 2, 3, 4))["0"][0] == "absorbed elu"


class CountsCalls(nn.ReLU):
    count = 0

    def forward(self, input: Tensor) -> Tensor:
        self.count += 1
        return super().forward(input)


class OwnSilu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class StraightThrough(nn.Module):
    """Forward as relu, backward as the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.relu() - x).detach()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (OwnSilu(), "silu"),
        (StraightThrough(), None),
        (CountsCalls(), None),
        (nn.LeakyReLU(0.2), None),
        (nn.ELU(0.5), None),
        (nn.GELU("tanh"), None),
        (nn.Hardtanh(0, 6), None),
        (nn.RReLU(), None),
        (nn.PReLU(), None),
        (nn.Softmax(1), None),
        (nn.LeakyReLU(), "leaky_relu"),
    ],
    ids=str,
)
def test_activation_modules_are_known_by_what_they_do(module, name):
    assert activation_of_module(module) == name
    converted(net(lambda self, x: self.act(self.bn1(x)), act=module))


def changes_input_before_the_addition(self, x):
    h = torch.tanh(x)
    out = self.bn1(h)
    h.mul_(2)
    return F.relu(out + h)


def shared_before_the_addition(self, x):
    out = self.bn1(self.conv1(x))
    return F.relu(out + self.bn1(x))


def keeps_a_view(self, x):
    out = self.bn1(x)
    flat = out.flatten(1)
    return out.relu_().sum() + flat


def adds_into_another_tensor(self, x):
    h = self.conv1(x)
    kept = h
    h += self.bn1(x)
    return F.relu(h) + kept


NOT_ABSORBED = {
    "two uses": (lambda self, x: (y := self.bn1(x)) * F.relu(y), "used by 2 operations"),
    "two outputs": (lambda self, x: (F.relu(self.bn1(x)), self.bn1(x)), ""),
    "returned too": (lambda self, x: (F.relu(y := self.bn1(x)), y), "used by 2 operations"),
    "view": (keeps_a_view, "used by 2 operations"),
    "slope": (lambda self, x: F.leaky_relu(self.bn1(x), 0.2), "leaky_relu follows"),
    "alpha": (lambda self, x: F.elu(self.bn1(x), alpha=0.5), "elu follows"),
    "gelu": (lambda self, x: F.gelu(self.bn1(x), approximate="tanh"), "gelu follows"),
    "scale": (lambda self, x: F.elu_(self.bn1(x), 1.0, 2.0), "elu_ follows"),
    "alpha of the addition": (lambda self, x: F.relu(torch.add(self.bn1(x), x, alpha=2)), "further arguments"),
    "number": (lambda self, x: F.relu(self.bn1(x) + 1), "a number is added"),
    "parameter": (lambda self, x: F.relu(self.bn1(x) + self.scale), "a parameter or a buffer is added"),
    "itself": (lambda self, x: F.relu((y := self.bn1(x)) + y), "added to itself"),
    "no activation": (lambda self, x: self.bn1(x) + x, "no activation after it"),
    "other tensor": (adds_into_another_tensor, "in place to another tensor"),
    "shared": (shared_before_the_addition, ""),
    "subtraction": (lambda self, x: F.relu(self.bn1(x) - x), "sub follows"),
    "dropout": (lambda self, x: F.relu(F.dropout(self.bn1(x), 0.0)), "dropout follows"),
    "output": (lambda self, x: self.bn1(x), "its output is the model's"),
    "not called": (lambda self, x: F.relu(F.batch_norm(x, None, None, training=True)), "does not call it"),
}


@pytest.mark.parametrize(("forward", "reason"), NOT_ABSORBED.values(), ids=NOT_ABSORBED)
def test_what_is_not_only_followed_by_an_activation_is_not_absorbed(forward, reason):
    what, why = converted(net(forward))["bn1"]
    if reason:
        assert (what, reason in why) == ("converted", True), (what, why)


def test_a_layer_does_not_wait_for_an_addition_if_its_input_changes_before():
    model = net(changes_input_before_the_addition)
    original, x = copy.deepcopy(model), torch.randn(4, C, 6, 6)
    _, changes = batchnorm.convert(model)
    assert "may change its input" in changes[0].reason
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x))


def broadcasts(self, x):
    return F.relu(self.bn1(x) + x.mean((2, 3), keepdim=True))


def adds_another_dtype(self, x):
    out = self.bn1(x)
    out += x.double()
    return F.relu(out)


@pytest.mark.parametrize("forward", [broadcasts, adds_another_dtype])
def test_operands_of_another_shape_or_dtype_are_added_as_before(forward):
    converted(net(forward))


def mode_decides(self, x):
    y = self.bn1(x)
    return y if self.training else F.relu(y)


def counts(self, x):
    self.flag += 1
    return F.relu(self.bn1(x))


def counts_in_a_buffer(self, x):
    self.calls.add_(1)
    return F.relu(self.bn1(x))


def assigns_a_buffer(self, x):
    self.calls = self.calls + 1
    return F.relu(self.bn1(x))


def keeps_features(self, x):
    self.features = [self.bn1(x)]
    return F.relu(self.features[0])


def clamps_parameters(self, x):
    for parameter in self.parameters():
        parameter.data.clamp_(-0.1, 0.1)
    return F.relu(self.bn1(x))


def without_gradient(self, x):
    with torch.no_grad():
        y = self.bn1(x)
    return F.relu(y) + self.conv1(x)


def stochastic_depth(self, x):
    y = self.bn1(x)
    if self.training and random.random() < 0.5:
        y = y * 0
    return F.relu(y)


def asks_for_the_type(self, x):
    y = self.bn1(x) if isinstance(x, Tensor) else x
    return F.relu(y)


def looks_at_values(self, x):
    y = self.bn1(x)
    return F.relu(y) if y.mean() > 0.1 else y


def makes_a_constant(self, x):
    return F.relu(self.bn1(x)) + torch.ones(1)


def names_a_dtype(self, x):
    return F.relu(self.bn1(x)).to(next(self.parameters()).dtype)


def checkpoints(self, x):
    return torch.utils.checkpoint.checkpoint(lambda x: F.relu(self.bn1(x)), x, use_reentrant=False)


def asks_for_the_mode_of_a_layer(self, x):
    y = self.bn1(x)
    return F.relu(y) if self.bn1.training else F.relu(y) * 2


def prints_in_a_helper(self, x):
    return self.helper(F.relu(self.bn1(x)))


def helper(self, x):
    print(end="")
    return x


Net.helper = helper


CANNOT_FOLLOW = {
    asks_for_the_mode_of_a_layer: "the mode of another module",
    prints_in_a_helper: "uses print",
    mode_decides: "",
    counts: "changes attributes",
    counts_in_a_buffer: None,
    assigns_a_buffer: "",
    keeps_features: "changes attributes",
    clamps_parameters: "not computed from its input",
    without_gradient: "switches gradients",
    stochastic_depth: "random numbers",
    asks_for_the_type: "type of a value",
    looks_at_values: "branches on values",
    makes_a_constant: "not computed from its input",
    names_a_dtype: "a device or a dtype",
    checkpoints: "uses checkpoint",
}


@pytest.mark.parametrize(("forward", "reason"), CANNOT_FOLLOW.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_a_forward_that_no_graph_can_replace_is_left_alone(forward, reason):
    model = net(forward)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    other = copy.deepcopy(model)
    _, changes = batchnorm.convert(other)
    torch.testing.assert_close(dict(other.state_dict()), before, rtol=0, atol=0)
    assert set(vars(other)) - attributes <= {"forward", "_replicate_for_data_parallel"}
    if reason is not None:
        assert changes[0].what == "converted"
        assert reason in changes[0].reason
    if forward is not stochastic_depth:
        converted(model)


def test_a_forward_that_is_replaced_on_the_instance_is_left_alone():
    model = net(lambda self, x: F.relu(self.bn1(x)))
    model.forward = lambda x: model.conv1(x)
    _, changes = batchnorm.convert(model)
    assert "replaced on the instance" in changes[0].reason


def test_call_of_a_class_is_not_run_twice():
    class Doubled(nn.Conv2d):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    changes = converted(net(lambda self, x: F.relu(self.bn1(self.conv(x))), conv=Doubled(C, C, 1)))
    assert "__call__" in changes["bn1"][1]


def branches_on_shape(self, x):
    if x.dim() != 4 or x.shape[1] != C:
        raise ValueError("bad input")
    pad = int(x.shape[-1]) % 2
    y = F.relu(self.bn1(F.pad(x, (0, pad))))
    return y if x.size(2) > 5 else y * 2


def test_branches_on_the_shape_follow_the_example_and_are_checked_in_every_call():
    model, x = net(branches_on_shape), torch.randn(4, C, 6, 6)
    assert "only an example can tell" in converted(copy.deepcopy(model))["bn1"][1]
    original = copy.deepcopy(model)
    assert converted(copy.deepcopy(model), example=x)["bn1"] == ("absorbed relu", "")
    batchnorm.convert(model, x)
    for shape in ((4, C, 6, 6), (2, C, 3, 7), (4, C, 6, 5)):
        torch.testing.assert_close(model(torch.ones(shape)), original(torch.ones(shape)))
    with pytest.raises(ValueError, match="bad input"):
        model(torch.randn(4, C))


def test_example_tells_the_arguments_of_a_block():
    block = net(
        lambda self, x, rate=None, other=None: F.relu(self.bn1(x)) * (rate or 1) + (0 if other is None else other)
    )
    model = net(lambda self, x: self.block(x, rate=0.5, other=x) if x.sum() > -1e9 else x, block=block)
    x = torch.randn(4, C, 6, 6)
    original = copy.deepcopy(model)
    _, changes = batchnorm.convert(model, (x,))
    assert changes[2].what == "absorbed relu"
    assert_same_model(original, model, x)


def test_container_whose_modules_are_called_one_by_one():
    def forward(self, x):
        for module in self.parts:
            x = module(x)
        return x

    model = net(forward, parts=nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()))
    for example in (None, torch.randn(4, C, 6, 6)):
        again = copy.deepcopy(model)
        assert converted(again, example=example)["parts.1"] == ("absorbed relu", "")
        assert "forward" in vars(again)
        assert "forward" not in vars(again.parts)


def test_blocks_that_take_lists_are_followed_from_outside():
    inner = net(lambda self, xs: self.relu(self.bn1(self.conv1(xs[0] + xs[1]))))
    model = net(lambda self, x: self.inner([x, x]), inner=inner)
    assert converted(model)["inner.bn1"] == ("absorbed relu", "")
    assert "forward" in vars(model)
    assert "forward" not in vars(model.inner)


def test_weights_that_are_computed_are_no_obstacle():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 1))
    model = nn.Sequential(conv, nn.BatchNorm2d(C), nn.ReLU())
    assert converted(model)["1"] == ("absorbed relu", "")


def test_attributes_that_a_forward_reads_from_its_modules_may_change():
    model = net(lambda self, x: F.relu(self.bn1(x)) * self.drop.p, drop=nn.Dropout(0.5))
    original = copy.deepcopy(model)
    assert converted(copy.deepcopy(model))["bn1"] == ("absorbed relu", "")
    batchnorm.convert(model)
    for m in (model, original):
        m.drop.p = 0.25
    assert_same_model(original, model, torch.randn(4, C, 6, 6))


@pytest.mark.parametrize("name", ["if", "a b", 'a"b'])
def test_module_names_that_no_code_can_spell(name):
    model = nn.Sequential()
    model.add_module(name, nn.BatchNorm2d(C))
    model.add_module("act", nn.ReLU())
    converted(model)
