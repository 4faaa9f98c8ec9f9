"""CRC-32C (Castagnoli), as TensorFlow's files store it, at NumPy's speed.

Source: RFC 3720, section 12.1 (the polynomial); TensorFlow's ``lib/hash/crc32c.h`` (the mask).
"""

import numpy as np

# reflected
POLYNOMIAL = 0x82F63B78
MASK_DELTA = 0xA282EAD8
# at least 8 steps of the vectorized loop; below that, bytes one by one are as fast
LANES = 1024
# what is transposed at a time
PIECE = 1 << 24


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """The checksum of contiguous bytes.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    values = np.frombuffer(data, np.uint8)
    state = 0xFFFFFFFF
    for start in range(0, len(values), PIECE):
        state = advance(values[start : start + PIECE], state)
    return state ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """As it is stored, so that the checksum of bytes that hold checksums is still a good one."""
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def advance(values: np.ndarray, state: int) -> int:
    """The register after more bytes."""
    length = len(values) // LANES
    if length >= 8:
        state = advance_lanes(values[: LANES * length].reshape(LANES, length), state)
        values = values[LANES * length :]
    for value in values.tolist():
        state = BYTES[(state ^ value) & 255] ^ state >> 8
    return state


def advance_lanes(rows: np.ndarray, state: int) -> int:
    """The same for LANES equal parts at once.

    The register is linear in its state and in the bytes. So every part starts from 0, 32 more registers take each
    single bit of a state through as many zero bytes, and the parts are joined with them afterwards.
    """
    states = np.concatenate([np.zeros(LANES, np.uint32), 1 << np.arange(32, dtype=np.uint32)])
    states[0] = state
    columns = np.zeros((rows.shape[1], LANES + 32), np.uint8)
    columns[:, :LANES] = rows.T
    for column in columns:
        states = TABLE[(states ^ column) & 255] ^ states >> 8
    parts, images = states[:LANES].tolist(), states[LANES:].tolist()
    shifted = [[images_of(byte, images[start : start + 8]) for byte in range(256)] for start in (0, 8, 16, 24)]
    joined = parts[0]
    for part in parts[1:]:
        low, second, third, high = joined & 255, joined >> 8 & 255, joined >> 16 & 255, joined >> 24
        joined = shifted[0][low] ^ shifted[1][second] ^ shifted[2][third] ^ shifted[3][high] ^ part
    return joined


def images_of(byte: int, images: list[int]) -> int:
    """The sum of the images of the bits that are set."""
    total = 0
    for bit, image in enumerate(images):
        if byte >> bit & 1:
            total ^= image
    return total


def table_of_bytes() -> np.ndarray:
    """What the register becomes when it holds one byte and 8 zero bits follow."""
    states = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        states = np.where(states & 1, states >> 1 ^ np.uint32(POLYNOMIAL), states >> 1)
    return states


TABLE = table_of_bytes()
BYTES = TABLE.tolist()
