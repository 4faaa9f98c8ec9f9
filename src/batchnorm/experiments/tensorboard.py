"""The rows of a run as curves for TensorBoard, which reads them while the run goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchnorm.errors import MissingExtraError

# what tells the networks of a run apart, and what lies on the horizontal axis
NAMES, STEP = ("arm", "seed"), "step"


@contextmanager
def rows_to_tensorboard(folder: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes rows of metrics; it does nothing without a folder.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    if folder is None:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("TensorBoard is not installed: pip install 'batchnorm[tensorboard]'") from error
    with SummaryWriter(str(folder)) as writer:

        def write(row: dict[str, Any]) -> None:
            network = "/".join(str(row[name]) for name in NAMES)
            for name, value in row.items():
                if name not in (*NAMES, STEP) and isinstance(value, int | float):
                    writer.add_scalar(f"{name}/{network}", value, row[STEP])
            writer.flush()

        yield write
