"""The certificate: what folding changed in the output of each block, and of the whole model."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from batchnorm.errors import FoldError
from batchnorm.reference import batch_norm_inference
from batchnorm.surgery.fold_observe import bare_copy, in_double, run
from batchnorm.surgery.fold_plan import Group, Plan
from batchnorm.surgery.fold_search import Root
from batchnorm.surgery.linear_calls import LinearCall

# positions of a random input along each spatial dimension, besides those that the kernel covers at once
POSITIONS = 4


def errors_on_random_input(plan: Plan) -> dict[int, float]:
    """The error of each group, by its id, on values distributed as its first layer's statistics say, or normal ones."""
    return {id(group): error_of_call(group, group.linears[0], random_input(group)) for group in plan.all_groups()}


def random_input(group: Group) -> Tensor:
    linear, weight = group.linears[0], group.weight
    channels = weight.shape[0] if linear.transposed else weight.shape[1] * linear.groups
    dilation = linear.options.get("dilation", 1)
    dilations = [dilation] * linear.spatial if isinstance(dilation, int) else dilation
    kernel = weight.shape[2:]
    sizes = [POSITIONS + d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *sizes, generator=generator, dtype=torch.float64).to(weight.device)
    if group.before:
        mean, var = (
            t.double().view(-1, *[1] * len(sizes)) for t in (group.before.running_mean, group.before.running_var)
        )
        x = x * var.sqrt() + mean
    return x.to(group.dtype)


def error_of_call(group: Group, linear: LinearCall, x: Tensor) -> float:
    """Largest difference between folded, in the dtype of the weight, and unfolded, in float64; relative to the output.

    ``x`` is the input of what stands first in the group.
    """
    exact = x.double()
    if group.before:
        exact = normalized(group.before, exact)
    exact = linear.run(exact, group.weight, group.bias)
    if group.after:
        exact = normalized(group.after, exact)
    bias = None if group.folded_bias is None else group.folded_bias.to(group.dtype)
    return relative_error(linear.run(x, group.folded_weight.to(group.dtype), bias), exact)


def normalized(layer: Any, x: Tensor) -> Tensor:
    tensors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return batch_norm_inference(x, *(None if t is None else t.double() for t in tensors), eps=layer.eps)  # pyright: ignore[reportArgumentType]


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Largest difference by the largest absolute value; where both are not finite, there is none."""
    if not exact.numel():
        return 0.0
    difference = (result.double() - exact).abs()
    same = (result.double() == exact) | (result.isnan() & exact.isnan())
    largest = difference.masked_fill(same, 0.0).nan_to_num(torch.inf, torch.inf).max().item()
    scale = exact.masked_fill(~exact.isfinite(), 0.0).abs().max().item()
    return largest / scale if scale else largest


class Measure(Interpreter):
    """Runs the graph of a root and measures the groups in it on the values that pass."""

    def __init__(self, root: Root, block: nn.Module, plan: Plan, errors: dict[int, float]) -> None:
        super().__init__(block, graph=root.trace.graph)
        self.errors = errors
        self.first: dict[Node, tuple[Group, LinearCall]] = {}
        for group in plan.all_groups():
            for number, linear in enumerate(group.linears if group.root is root else []):
                self.first[group.calls[number] if group.before else linear.node] = (group, linear)

    def run_node(self, n: Node) -> Any:
        if n in self.first:
            group, linear = self.first[n]
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            x = args[0] if args else kwargs["input"]
            error = error_of_call(group, linear, x)
            self.errors[id(group)] = max(error, self.errors.get(id(group), 0.0))
        return super().run_node(n)


def errors_on_example(plan: Plan, bare: nn.Module, example: Any) -> dict[int, float]:
    """The error of each group on what the example's first call of its root brings."""
    errors: dict[int, float] = {}
    done: set[str] = set()

    def measure(root: Root) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if root.name not in done:
                done.add(root.name)
                given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
                tensors = [given[argument.name] for argument in root.arguments if argument.is_tensor]
                Measure(root, block, plan, errors).run(*tensors)

        return hook

    roots = {group.root.name: group.root for group in plan.all_groups()}
    handles = [
        bare.get_submodule(name).register_forward_pre_hook(measure(root), with_kwargs=True)
        for name, root in roots.items()
    ]
    run(bare, example)
    for handle in handles:
        handle.remove()
    return errors


def check_whole(model: nn.Module, bare: nn.Module, install: Callable[[nn.Module], None], example: Any) -> None:
    """Compare the outputs of the model before and after ``install``, in float64 and in its own dtype.

    In float64, without rounding of weights, only a wrong fold makes a difference that half of the digits show.

    Raises:
        FoldError: they differ by more than rounding can.
    """
    exact = before = run(bare, example)
    try:
        wide = bare_copy(model).double()
        exact = run(wide, in_double(example))
    except Exception:
        # it names a dtype, or has tensors that cannot be float64
        wide = None
    if wide is not None:
        install(wide)
        compare(run(wide, in_double(example)), exact, exact, "in float64")
    install(bare)
    compare(run(bare, example), before, exact, "in its own dtype")


def compare(results: Sequence[Tensor], before: Sequence[Tensor], exact: Sequence[Tensor], where: str) -> None:
    if not exact:
        raise FoldError("the model gives no floating point tensor for the example: nothing could be compared")
    for result, unfolded, true in zip(results, before, exact, strict=True):
        allowed = 2 * relative_error(unfolded, true.double()) + torch.finfo(result.dtype).eps ** 0.5
        error = relative_error(result, true.double())
        if not error <= allowed:
            raise FoldError(
                f"the folded model would differ from the model {where} by {error:.3g} of the largest output, "
                f"rounding explains {allowed:.3g}: its forward uses a layer or a weight in a way that was not seen"
            )
