"""Which names a pickle may use without running anything of its author's: torch's own list; what storages hold."""


def words(text: str) -> list[str]:
    return text.split()


STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "BFloat16": "bfloat16",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "QInt8": "qint8",
    "QInt32": "qint32",
    "QUInt8": "quint8",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}
ON_CUDA = [name for name in STORAGES if not name.startswith("Q")]
TENSORS = ["Double", "Float", "Half", "Long", "Int", "Short", "Char", "Byte", "BFloat16"]
DTYPES = words(
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64 complex128 complex64 "
    "complex32 qint8 qint32 quint8 quint4x2 quint2x4 bits16 bits8 bits4x2 bits2x4 bits1x8 float8_e5m2 float8_e4m3fn "
    "float8_e5m2fnuz float8_e4m3fnuz float8_e8m0fnu float4_e2m1fn_x2 int1 int2 int3 int4 int5 int6 int7 uint1 uint2 "
    "uint3 uint4 uint5 uint6 uint7"
)
REBUILD = words(
    "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter _rebuild_parameter_with_state "
    "_rebuild_qtensor _rebuild_sparse_tensor _rebuild_meta_tensor_no_storage _rebuild_nested_tensor "
    "_rebuild_wrapper_subclass _rebuild_device_tensor_from_numpy _rebuild_device_tensor_from_cpu_tensor"
)
SCHEMES = words(
    "per_tensor_affine per_tensor_symmetric per_channel_affine per_channel_symmetric per_channel_affine_float_qparams"
)

# what torch.load(weights_only=True) of torch 2.13 accepts
ALLOWED = frozenset(
    [
        "collections.OrderedDict",
        "collections.Counter",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.set",
        "builtins.complex",
        "torch._tensor._rebuild_from_type_v2",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        *(f"torch.{name}" for name in [*DTYPES, *SCHEMES]),
        *(f"torch._utils.{name}" for name in REBUILD),
        *(f"torch.{name}Storage" for name in STORAGES),
        *(f"torch.cuda.{name}Storage" for name in ON_CUDA),
        *(f"torch.{name}Tensor" for name in [*TENSORS, "Bool"]),
        *(f"torch.cuda.{name}Tensor" for name in [*TENSORS, "Bool"]),
        *(f"torch.sparse.{name}Tensor" for name in TENSORS),
        *(f"torch.cuda.sparse.{name}Tensor" for name in TENSORS),
    ]
)
# a model that was saved whole needs its classes; it never needs these
RUNNING_MODULES = frozenset(
    words(
        "os posix nt sys subprocess pty shutil runpy socket importlib ctypes code commands webbrowser multiprocessing "
        "asyncio pickle _pickle marshal types urllib http requests signal threading bdb pdb timeit"
    )
)
RUNNING_BUILTINS = frozenset(
    words(
        "eval exec compile open getattr setattr delattr __import__ globals locals vars input breakpoint apply execfile "
        "map filter"
    )
)
RUNNING = frozenset(
    [
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.itemgetter",
        "functools.reduce",
        "numpy.f2py",
        "torch.hub",
    ]
)


def is_known_to_run(name: str) -> bool:
    """Whether this is a function that malicious pickles are known to call: to run programs, or to get at others."""
    module, _, attribute = name.rpartition(".")
    if module == "builtins":
        return attribute in RUNNING_BUILTINS
    return name.partition(".")[0] in RUNNING_MODULES or any(f"{name}.".startswith(f"{known}.") for known in RUNNING)


def storage_dtype(name: str) -> str | None:
    """Of "torch.FloatStorage", also on a device; None if this is no storage."""
    module, _, kind = name.rpartition(".")
    if kind in ("UntypedStorage", "TypedStorage") and module == "torch.storage":
        return "uint8"
    known = module in ("torch", "torch.cuda") or module.startswith("torch.storage")
    return STORAGES.get(kind.removesuffix("Storage")) if known and kind.endswith("Storage") else None
