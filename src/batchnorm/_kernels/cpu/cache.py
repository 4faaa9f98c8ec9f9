"""Compiled kernels in a private folder, or nowhere.

Loading a kernel runs code, so the folder must belong to this user and nobody else may write to it.
"""

import hashlib
import os
import pickle
import platform
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import serialize
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target

FOLDER_VARIABLE = "BATCHNORM_CACHE_DIR"
DIGEST_BYTES = hashlib.sha256().digest_size


class CompiledKernel:
    """One kernel's file, in the form that ``numba.cfunc`` expects of a cache. What cannot be read is compiled again."""

    def __init__(self, name: str) -> None:
        folder = private_folder()
        self.file = None if folder is None else folder / f"{name}.kernel"

    def load_overload(self, _signature: Any, target: Any) -> Any:
        target.refresh()
        if self.file is None:
            return None
        try:
            data = self.file.read_bytes()
            digest, payload = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() != digest:
                return None
            return CompileResult._rebuild(target, *pickle.loads(payload))
        except Exception:
            return None

    def save_overload(self, _signature: Any, result: Any) -> None:
        if self.file is None:
            return
        try:
            descriptor, name = tempfile.mkstemp(dir=self.file.parent)
            with os.fdopen(descriptor, "wb") as file:
                payload = serialize.dumps(result._reduce())
                file.write(hashlib.sha256(payload).digest() + payload)
            os.replace(name, self.file)
        except Exception:
            self.file = None


def private_folder() -> Path | None:
    """The folder for kernels of these sources, this Numba and this processor; None where none is safe."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get(FOLDER_VARIABLE) or os.path.join(home, "batchnorm")) / fingerprint()
    try:
        # each by itself: the mode holds for the last folder only
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder if is_private(folder) and is_private(folder.parent) else None
    except OSError:
        return None


def is_private(folder: Path) -> bool:
    status = folder.stat()
    if not hasattr(os, "getuid"):
        return os.access(folder, os.W_OK)
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.getuid() and not others_write and os.access(folder, os.W_OK)


@cache
def fingerprint() -> str:
    """Of everything that a compiled kernel depends on."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    context: Any = cpu_target.target_context
    codegen = context.codegen()
    parts = (numba.__version__, llvmlite.__version__, platform.python_version(), *codegen.magic_tuple())
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:16]
