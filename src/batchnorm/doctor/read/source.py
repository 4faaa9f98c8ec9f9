"""Bytes of a file by position, and names from it as they may be shown."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from batchnorm.errors import DataError

SHOWN = 80


class Source:
    """A regular file. It is opened anew for each reading, so that nothing stays open and nothing moves a position."""

    def __init__(self, path: str | Path) -> None:
        self.name, self.path = str(path), Path(path)
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{path}: cannot be opened ({reason}); expected a checkpoint file") from None
        if not stat.S_ISREG(status.st_mode):
            raise self.error("is no regular file; expected a checkpoint file")
        self.size = status.st_size

    def read(self, start: int, count: int) -> bytes:
        """All of the bytes that were asked for."""
        if start < 0 or count < 0 or start + count > self.size:
            raise self.error(f"has {self.size} bytes; bytes {start} to {start + count} were asked for")
        data = self.read_up_to(start, count)
        if len(data) != count:
            raise self.error("became shorter while it was read; try again when nothing writes to it")
        return data

    def read_up_to(self, start: int, count: int) -> bytes:
        """As many of the bytes as there are."""
        with self.open() as file:
            file.seek(start)
            return file.read(max(0, min(count, self.size - start)))

    def open(self) -> BinaryIO:
        """Without a buffer."""
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            raise self.error(f"cannot be opened ({error.strerror})") from None

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.name}: {problem}")


def shown(name: object) -> str:
    """A name from a file as part of a message: on one line, without control characters, not longer than a line."""
    text = str(name)
    return ascii(text if len(text) <= SHOWN else text[:SHOWN] + "...")
