"""Activations and their derivatives, one scalar at a time; LLVM makes SIMD code of them.

In float32 the exponential is a polynomial of our own, since a call into libm cannot become SIMD code. Errors against
float64 are in ``tests/_kernels/test_activations.py``.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from batchnorm._kernels.cpu.elements import bits_of, float_of, fused, inner

f4 = np.float32

LOG2_E = f4(1.4426950408889634)
# ln 2 in two parts: the first has 9 bits, so that its product with the exponent is exact
LN2_HIGH = f4(0.693359375)
LN2_LOW = f4(-2.12194440e-4)
# added to a float below 2^22, it leaves the nearest integer in the lowest bits
ROUNDER = f4(12582912.0)
EXP_LOWEST, EXP_HIGHEST = f4(-87.33654), f4(88.72283)
# Chebyshev interpolation of (e^r - 1) / r on [-ln 2 / 2, ln 2 / 2]: relative error of e^r 5e-9
E0, E1, E2, E3, E4, E5 = (
    f4(v) for v in (1.0, 0.5, 0.16666504740715027, 0.04166635125875473, 0.008369158022105694, 0.001394112128764391)
)
# erf(t) / t in powers of t^2 on [0, 1]: relative error 1.4e-9
R0, R1, R2, R3, R4, R5, R6 = (
    f4(v)
    for v in (
        1.1283791065216064, -0.3761262595653534, 0.11283597350120544, -0.02685432881116867,
        0.005189312156289816, -0.0008018855005502701, 7.882497448008507e-05,
    )
)  # fmt: skip
# erfc(t) exp(t^2) t in powers of 1/t on t = 1 .. 10: relative error 1e-7
C0, C1, C2, C3, C4, C5, C6, C7, C8, C9 = (
    f4(v)
    for v in (
        0.5642200112342834, -0.0010344783077016473, -0.267393559217453, -0.11497988551855087, 0.9665610790252686,
        -1.5680986642837524, 1.4080137014389038, -0.7604684233665466, 0.23103581368923187, -0.03027205355465412,
    )
)  # fmt: skip
ONE, TWO, HALF, ZERO, INFINITY = f4(1), f4(2), f4(0.5), f4(0), f4(np.inf)
SQRT_HALF = f4(math.sqrt(0.5))


@fused
def exp_parts(x):
    """``p`` and the integer k, still in the lowest bits of a float, with exp(x) = 2^k (1 + p)."""
    k = x * LOG2_E + ROUNDER
    whole = k - ROUNDER
    r = (x - whole * LN2_HIGH) - whole * LN2_LOW
    return r * (E0 + r * (E1 + r * (E2 + r * (E3 + r * (E4 + r * E5))))), bits_of(k)


@fused
def limited(x):
    x = EXP_LOWEST if x < EXP_LOWEST else x
    return EXP_HIGHEST if x > EXP_HIGHEST else x


@fused
def exp_float32(x):
    p, k = exp_parts(limited(x))
    # 2^(k - 1), since 2^k has no float where the result is largest
    value = float_of((k + np.uint32(126)) << np.uint32(23)) * (ONE + p) * TWO
    return INFINITY if x > EXP_HIGHEST else value


@fused
def expm1_float32(x):
    p, k = exp_parts(limited(x))
    power = float_of((k + np.uint32(127)) << np.uint32(23))
    return power * p + (power - ONE)


@fused
def tanh_float32(x):
    # beyond 10, tanh is 1 in float32
    limit = f4(10)
    t = limit if x > limit else (-limit if x < -limit else x)
    e = expm1_float32(t + t)
    return e / (e + TWO)


@fused
def normal_cdf_float32(z):
    r""":math:`\Phi(z) = \frac{1}{2} erfc(-z / \sqrt 2)`."""
    t = abs(z) * SQRT_HALF
    s = t * t
    inner = t * (R0 + s * (R1 + s * (R2 + s * (R3 + s * (R4 + s * (R5 + s * R6))))))
    u = ONE / (t if t > ONE else ONE)
    q = C0 + u * (C1 + u * (C2 + u * (C3 + u * (C4 + u * (C5 + u * (C6 + u * (C7 + u * (C8 + u * C9))))))))
    tail = HALF * exp_float32(-s) * u * q
    if t < ONE:
        return HALF - HALF * inner if z < ZERO else HALF + HALF * inner
    return tail if z < ZERO else ONE - tail


@inner
def normal_cdf_float64(z):
    return 0.5 * math.erfc(-z * math.sqrt(0.5))


@inner
def exp_float64(x):
    return math.exp(x)


@inner
def expm1_float64(x):
    return math.expm1(x)


@inner
def tanh_float64(x):
    return math.tanh(x)


@cache
def activation_functions(name: str | None, real: type) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``forward(z)`` and ``backward(z, grad)`` in the given float type, with torch's default parameters and edges."""
    single = real is np.float32
    exp = exp_float32 if single else exp_float64
    expm1 = expm1_float32 if single else expm1_float64
    tanh = tanh_float32 if single else tanh_float64
    cdf = normal_cdf_float32 if single else normal_cdf_float64
    zero, one, two, half, three, six = (real(v) for v in (0, 1, 2, 0.5, 3, 6))
    slope, density = real(0.01), real(1 / math.sqrt(2 * math.pi))

    # Written so that NaN takes the branch that keeps it.
    def relu(z):
        return zero if z <= zero else z

    def relu_backward(z, grad):
        return zero if z <= zero else grad

    def relu6(z):
        return zero if z <= zero else (six if z >= six else z)

    def relu6_backward(z, grad):
        return zero if z <= zero or z >= six else grad

    def leaky_relu(z):
        return z if z > zero else z * slope

    def leaky_relu_backward(z, grad):
        return grad if z > zero else grad * slope

    def elu(z):
        return z if z > zero else expm1(z)

    def elu_backward(z, grad):
        return grad if z > zero else grad * exp(z)

    def sigmoid(z):
        return one / (one + exp(-z))

    def sigmoid_backward(z, grad):
        s = one / (one + exp(-z))
        return grad * (s * (one - s))

    def sigmoid_by_output(y, grad):
        return grad * (y * (one - y))

    def tanh_backward(z, grad):
        t = tanh(z)
        return grad * (one - t * t)

    def tanh_by_output(y, grad):
        return grad * (one - y * y)

    def silu(z):
        return z / (one + exp(-z))

    def silu_backward(z, grad):
        s = one / (one + exp(-z))
        return grad * (s * (one + z * (one - s)))

    def gelu(z):
        return z * cdf(z)

    def gelu_backward(z, grad):
        return grad * (cdf(z) + z * density * exp(-half * z * z))

    def mish(z):
        # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2), which is 1 from z = 20 on
        e = exp(z if z < real(20) else real(20))
        n = e * (e + two)
        return z * (n / (n + two))

    def mish_backward(z, grad):
        e = exp(z if z < real(20) else real(20))
        n = e * (e + two)
        t = n / (n + two)
        s = e / (one + e)
        return grad * (t + z * s * (one - t * t))

    def hardswish(z):
        gate = z + three
        return z * (zero if gate <= zero else (six if gate >= six else gate)) / six

    def hardswish_backward(z, grad):
        return zero if z <= -three else (grad if z >= three else grad * (z / three + half))

    functions = {
        None: (lambda z: z, lambda z, grad: grad),
        "relu": (relu, relu_backward),
        "relu6": (relu6, relu6_backward),
        "leaky_relu": (leaky_relu, leaky_relu_backward),
        "elu": (elu, elu_backward),
        "silu": (silu, silu_backward),
        "gelu": (gelu, gelu_backward),
        "mish": (mish, mish_backward),
        "sigmoid": (sigmoid, sigmoid_backward),
        "sigmoid_by_output": (sigmoid, sigmoid_by_output),
        "tanh": (tanh.py_func, tanh_backward),
        "tanh_by_output": (tanh.py_func, tanh_by_output),
        "hardswish": (hardswish, hardswish_backward),
    }
    forward, backward = functions[name]
    return fused(forward), fused(backward)


# The derivative as a function of the output, for a backward pass that has it.
BY_OUTPUT = ("sigmoid_by_output", "tanh_by_output")

# Their backward needs to know of z only on which side of a threshold it lay, and the output tells that too.
PIECEWISE = ("relu", "relu6", "leaky_relu")


@cache
def piecewise_functions(name: str | None, real: type) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``passes(output)``: does the gradient pass unchanged? ``blocked(grad)``: what becomes of it if not."""
    zero, six = real(0), real(6)
    slope = real(0.01) if name == "leaky_relu" else zero

    def above(y):
        return not y <= zero

    def within(y):
        return not (y <= zero or y >= six)

    def positive(y):
        return y > zero

    def blocked(grad):
        return grad * slope

    def stopped(grad):
        return zero

    passes = {None: above, "relu": above, "relu6": within, "leaky_relu": positive}[name]
    return inner(passes), inner(blocked if name == "leaky_relu" else stopped)
