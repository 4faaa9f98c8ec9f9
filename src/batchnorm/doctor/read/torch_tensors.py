"""Tensors as torch pickles them: which storage, which elements of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.read.dtypes import SIZES, decode
from batchnorm.doctor.read.pickle_machine import Constructor, Global
from batchnorm.doctor.read.torch_globals import storage_dtype

# torch numbers them
LONGEST_KEY = 64
MOST_DIMENSIONS = 64
# a tensor may have more elements than its storage (expanded ones have), but not to fill the memory with them
LARGEST_EXPANDED = 64 << 20


@dataclass(frozen=True, slots=True)
class Storage:
    key: str
    dtype: str
    count: int  # elements
    start: int = 0  # the first element that belongs to it, in legacy files


@dataclass(slots=True)
class TensorRecord:
    """A tensor as the pickle describes it; ``problem`` says why its values cannot be read."""

    dtype: str
    shape: tuple[int, ...]
    storage: Storage | None = None
    offset: int = 0
    stride: tuple[int, ...] = ()
    conjugated: bool = False
    negated: bool = False
    problem: str = field(default="")

    @property
    def reach(self) -> int:
        """One more than the last element of the storage that it has."""
        if 0 in self.shape:
            return 0
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


def to_storage(identity: Any) -> Any:
    """What stands for a persistent id: torch gives one to each storage, older versions to classes with their source."""
    parts: list[Any] = [*identity[:7]] if isinstance(identity, tuple) else []
    if len(parts) >= 2 and parts[0] == "module":
        return parts[1]
    if len(parts) not in (5, 6) or parts[0] not in ("storage", b"storage"):
        raise ValueError("a persistent id is none of a storage")
    _, kind, key, _, count, *view = parts
    dtype = storage_dtype(kind.name) if isinstance(kind, Global) else None
    if dtype is None or not isinstance(key, str) or len(key) > LONGEST_KEY or not is_size(count):
        raise ValueError("a storage has no known type, key and size")
    start = 0
    if view and view[0] is not None:
        if not isinstance(view[0], tuple) or len(view[0]) != 3 or not is_size(view[0][1]) or not is_size(view[0][2]):
            raise ValueError("a view of a storage is no key, offset and size")
        start = view[0][1]
    return Storage(key, dtype, count, start)


def rebuild_tensor(arguments: tuple[Any, ...], dtype: str | None = None) -> TensorRecord:
    """``_rebuild_tensor``, ``_rebuild_tensor_v2``."""
    storage, offset, shape, stride, *rest = arguments[:7]
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    size, steps = sizes(shape), sizes(stride)
    if not is_size(offset) or len(size) != len(steps):
        raise ValueError("a tensor has no valid offset and strides")
    bits = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    record = TensorRecord(dtype or storage.dtype, size, storage, offset, steps)
    record.conjugated = bool(bits.get("conj"))
    record.negated = bool(bits.get("neg")) and record.dtype != "bool"
    record.problem = problem_of(record)
    return record


def problem_of(record: TensorRecord) -> str:
    if record.dtype not in SIZES:
        return f"{record.dtype} is not read"
    assert record.storage is not None
    width = SIZES.get(record.storage.dtype, 1)
    if record.storage.start * width + record.reach * SIZES[record.dtype] > record.storage.count * width:
        return f"reaches element {record.reach} of a storage of {record.storage.count}"
    if math.prod(record.shape) * SIZES[record.dtype] > max(record.storage.count * width, LARGEST_EXPANDED):
        return "is expanded to more than its storage holds"
    return ""


def rebuild_v3(arguments: tuple[Any, ...]) -> TensorRecord:
    """Of a type without a storage class of its own."""
    *common, dtype = arguments[:7]
    return rebuild_tensor((*common, *arguments[7:8]), dtype_name(dtype))


def rebuild_parameter(arguments: tuple[Any, ...]) -> Any:
    return arguments[0]


def rebuild_from_type(arguments: tuple[Any, ...]) -> Any:
    function, _, inner = arguments[:3]
    constructor = CONSTRUCTORS.get(function.name) if isinstance(function, Global) else None
    if constructor is None or not isinstance(inner, tuple) or constructor is rebuild_from_type:
        raise ValueError("a tensor of a class of its own is built by something unknown")
    return constructor(inner)


def rebuild_sparse(arguments: tuple[Any, ...]) -> TensorRecord:
    data = arguments[1][:4] if isinstance(arguments[1], tuple) else ()
    dtypes = [part.dtype for part in data if isinstance(part, TensorRecord)]
    shape = next((part for part in data if isinstance(part, tuple)), ())
    return TensorRecord(dtypes[-1] if dtypes else "", sizes(shape), problem="sparse tensors are not read")


def rebuild_quantized(arguments: tuple[Any, ...]) -> TensorRecord:
    record = rebuild_tensor(arguments[:4])
    record.problem = "quantized tensors are not read"
    return record


def described(dtype_at: int, shape_at: int, problem: str) -> Constructor:
    """A constructor of tensors without values: which argument is what."""

    def build(arguments: tuple[Any, ...]) -> TensorRecord:
        return TensorRecord(dtype_name(arguments[dtype_at]), sizes(arguments[shape_at]), problem=problem)

    return build


def rebuild_nested(arguments: tuple[Any, ...]) -> TensorRecord:
    dtype = arguments[0].dtype if isinstance(arguments[0], TensorRecord) else ""
    return TensorRecord(dtype, (), problem="nested tensors are not read")


def first_or_nothing(arguments: tuple[Any, ...]) -> Any:
    return arguments[0] if arguments else []


CONSTRUCTORS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_v3,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
    "torch._utils._rebuild_sparse_tensor": rebuild_sparse,
    "torch._utils._rebuild_qtensor": rebuild_quantized,
    "torch._utils._rebuild_meta_tensor_no_storage": described(0, 1, "a meta tensor has no values"),
    "torch._utils._rebuild_wrapper_subclass": described(1, 2, "tensors of other classes are not read"),
    "torch._utils._rebuild_nested_tensor": rebuild_nested,
    "torch.Size": first_or_nothing,
    "builtins.set": first_or_nothing,
    "builtins.frozenset": first_or_nothing,
}


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def sizes(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or len(shape) > MOST_DIMENSIONS or not all(map(is_size, shape)):
        raise ValueError("a shape or stride is no tuple of sizes")
    return shape


def dtype_name(dtype: Any) -> str:
    return dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""


def stored(name: str, record: TensorRecord, read: Callable[[str, int, int], bytes], big_endian: bool) -> StoredTensor:
    """The tensor in the normal form; ``read`` gets the key of a storage and a range of its bytes."""

    def load() -> np.ndarray:
        storage, width = record.storage, SIZES[record.dtype]
        assert storage is not None
        start = storage.start * SIZES.get(storage.dtype, 1) + record.offset * width
        count = max(0, record.reach - record.offset)
        flat = decode(read(storage.key, start, count * width), record.dtype, big_endian=big_endian)
        steps = [step * flat.itemsize for step in record.stride]
        values = np.lib.stride_tricks.as_strided(flat, record.shape, steps) if count else flat.reshape(record.shape)
        values = np.conj(values) if record.conjugated else values
        return -values if record.negated else values.copy()

    return StoredTensor(name, record.shape, record.dtype, load)
