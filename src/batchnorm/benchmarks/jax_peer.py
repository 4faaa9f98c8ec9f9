"""The same formulas in JAX, compiled by XLA. Nothing else of the package imports JAX."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.benchmarks.cases import BOTH, EVALUATION, Case, Inputs
from batchnorm.benchmarks.correctness import EPS, MOMENTUM
from batchnorm.benchmarks.peers import Runner

# XLA's pool of threads has as many as NPROC says, once, when JAX starts
THREADS = "NPROC"


def load_jax() -> Any:
    """JAX on the CPU, with float64 and as many threads as torch has when this is called first."""
    os.environ.setdefault(THREADS, str(torch.get_num_threads()))
    import jax  # pyright: ignore[reportMissingImports]

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    return jax


def prepare_jax(case: Case, pass_: str, inputs: Inputs) -> Runner:
    """A runner of one jitted function that takes tensors and running statistics and returns all that is new."""
    jax = load_jax()
    jitted = jax.jit(one_pass(jax, case, pass_))
    last = channels_last(case)
    arrays = [to_jax(jax, inputs.x, last), to_jax(jax, inputs.residual, last), to_jax(jax, inputs.grad_output, last)]
    parameters = to_jax(jax, inputs.weight), to_jax(jax, inputs.bias)
    state = [to_jax(jax, inputs.running_mean), to_jax(jax, inputs.running_var)]

    def call() -> Any:
        results, state[:] = jax.block_until_ready(jitted(*arrays, *parameters, *state))
        return results

    begin = list(state)
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    state[:] = begin
    return Runner(
        call,
        lambda results: [to_torch(result, last) for result in results],
        lambda: [to_torch(value) for value in state],
        {"compile_seconds": round(seconds, 3)},
    )


def one_pass(jax: Any, case: Case, pass_: str) -> Callable[..., Any]:
    """The function to compile: (x, residual, grad_output, weight, bias, mean, var) to (results, new mean and var)."""
    np, channel = jax.numpy, -1 if channels_last(case) else 1
    act = activations(jax)[case.activation]

    def per_channel(v: Any, x: Any) -> Any:
        shape = [1] * x.ndim
        shape[channel] = -1
        return v.reshape(shape)

    def transform(x: Any, weight: Any, bias: Any, residual: Any, mean: Any, var: Any) -> Any:
        centered = x.astype(wide(np, x)) - per_channel(mean, x)
        z = centered * per_channel(jax.lax.rsqrt(var + EPS) * weight, x) + per_channel(bias, x)
        return act(z if residual is None else z + residual).astype(x.dtype)

    def train(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
        dims = [i for i in range(x.ndim) if i != channel % x.ndim]
        x32 = x.astype(wide(np, x))
        mean = x32.mean(dims)
        var = np.square(x32 - per_channel(mean, x)).mean(dims)
        return transform(x, weight, bias, residual, mean, var), (mean, var)

    def run(x: Any, residual: Any, grad_output: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        if pass_ == EVALUATION:
            return [transform(x, weight, bias, residual, mean, var)], [mean, var]
        if pass_ == BOTH:
            output, backward, new = jax.vjp(train, x, weight, bias, residual, has_aux=True)
            results = [output, *(gradient for gradient in backward(grad_output) if gradient is not None)]
        else:
            output, new = train(x, weight, bias, residual)
            results = [output]
        count = x.size // mean.size
        new_var = new[1] * (count / (count - 1))
        averages = [old + MOMENTUM * (batch - old) for old, batch in zip((mean, var), (new[0], new_var), strict=True)]
        return results, [average.astype(mean.dtype) for average in averages]

    return run


def activations(jax: Any) -> dict[str | None, Callable[[Any], Any]]:
    """Those of the suites, with torch's default parameters."""
    return {
        None: lambda z: z,
        "relu": jax.nn.relu,
        "relu6": jax.nn.relu6,
        "silu": jax.nn.silu,
        "gelu": lambda z: jax.nn.gelu(z, approximate=False),
        "sigmoid": jax.nn.sigmoid,
        "hardswish": jax.nn.hard_swish,
    }


def wide(np: Any, x: Any) -> Any:
    return np.float32 if x.dtype == np.bfloat16 else x.dtype


def channels_last(case: Case) -> bool:
    return case.memory_format != "contiguous"


def to_jax(jax: Any, tensor: Tensor | None, last: bool = False) -> Any:
    """A copy; with ``last`` of shape (N, *, C), which has the same order in memory as a channels_last tensor."""
    if tensor is None:
        return None
    moved = tensor.detach().movedim(1, -1) if last else tensor.detach()
    return jax.numpy.array(jax.dlpack.from_dlpack(moved.contiguous()), copy=True)


def to_torch(array: Any, last: bool = False) -> Tensor:
    tensor = torch.from_dlpack(array)
    return tensor.movedim(-1, 1) if last and tensor.dim() > 1 else tensor
