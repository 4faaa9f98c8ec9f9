"""Values of the element types that torch and safetensors store, without torch."""

from functools import cache

import numpy as np

PLAIN = {
    **{
        f"{kind}{8 * size}": f"{letter}{size}"
        for kind, letter in (("int", "i"), ("uint", "u"))
        for size in (1, 2, 4, 8)
    },
    **{f"float{8 * size}": f"f{size}" for size in (2, 4, 8)},
    "complex64": "c8",
    "complex128": "c16",
}
# bits of exponent and mantissa, bias, and what the largest exponent means
FLOAT8 = {
    "float8_e4m3fn": (4, 3, 7, "nan"),
    "float8_e5m2": (5, 2, 15, "ieee"),
    "float8_e4m3fnuz": (4, 3, 8, "unsigned zero"),
    "float8_e5m2fnuz": (5, 2, 16, "unsigned zero"),
}
SIZES = {
    **{name: int(code[1:]) for name, code in PLAIN.items()},
    **dict.fromkeys([*FLOAT8, "float8_e8m0fnu", "bool"], 1),
    "bfloat16": 2,
    "complex32": 4,
}
REAL = frozenset(SIZES) - {"complex32", "complex64", "complex128"}


def decode(raw: bytes | bytearray, dtype: str, *, big_endian: bool = False) -> np.ndarray:
    """The elements, 1-D: bfloat16 and float8 as float32, complex32 as complex64, all others as they are."""
    order = ">" if big_endian else "<"
    if dtype in PLAIN:
        code = PLAIN[dtype]
        return np.frombuffer(raw, order + code).astype(code)
    if dtype == "bool":
        return np.frombuffer(raw, "u1") != 0
    if dtype == "bfloat16":
        return (np.frombuffer(raw, order + "u2").astype("u4") << 16).view("f4")
    if dtype == "complex32":
        with np.errstate(invalid="ignore"):
            return np.frombuffer(raw, order + "f2").astype("f4").view("c8")
    return float8_table(dtype)[np.frombuffer(raw, "u1")]


@cache
def float8_table(dtype: str) -> np.ndarray:
    """Value of each of the 256 codes, float32."""
    code = np.arange(256)
    if dtype == "float8_e8m0fnu":
        return np.where(code == 255, np.nan, 2.0 ** (code - 127.0)).astype("f4")
    exponent_bits, mantissa_bits, bias, largest = FLOAT8[dtype]
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    size = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    value = np.where(code >= 128, -size, size)
    if largest == "unsigned zero":
        value[128] = np.nan
    elif largest == "nan":
        value[[127, 255]] = np.nan
    else:
        special = exponent == 2**exponent_bits - 1
        value[special] = np.where(fraction[special] == 0, np.copysign(np.inf, value[special]), np.nan)
    return value.astype("f4")
