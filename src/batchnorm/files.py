"""Files that are whole or absent: a reader, or a run that is resumed, never sees half of one."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, at once or in parts, so that after a crash at any instant it has its old or its new contents.

    Temporary file in the same folder, fsync, replace, fsync of the folder; the mode is that of an ordinary new file.

    Raises:
        OSError: the disk is full or the folder cannot be written; it names the file. The old file is then untouched.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "claims.json"
        >>> write_atomic(path, b"{}")
        >>> path.read_bytes()
        b'{}'
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON with a stable order; NaN and infinity are refused, as JSON has none."""
    write_atomic(path, (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """The same record with None for NaN and infinity, which a diverged network yields and JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def remove_temporary(folder: Path) -> None:
    """Delete what :func:`write_atomic` leaves when the process is killed: in a folder that nobody else writes to."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def current_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
