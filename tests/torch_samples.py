"""The sample inputs that torch tests its own batch normalization with."""

from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

# Importing torch's test suite forbids ``torch.backends.cudnn.benchmark = ...`` in the whole process: undo that.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

OP_INFO = next(op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
MODULE_INFO = {info.module_cls.__name__: info for info in module_db if info.name.startswith("nn.BatchNorm")}
LAYERS = tuple(MODULE_INFO)


def module_samples(name: str, training: bool, dtype: torch.dtype = torch.float32) -> list[Any]:
    info = MODULE_INFO[name]
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def module_error_samples(name: str) -> list[Any]:
    info = MODULE_INFO[name]
    return info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)


SAMPLES = [
    (name, number, sample.desc or "plain")
    for name in LAYERS
    for number, sample in enumerate(module_samples(name, training=True))
]
