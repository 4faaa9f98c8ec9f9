"""Images that cannot be read are left out and counted; too many of them end a run."""

from typing import Any

from batchnorm.errors import DataError
from batchnorm.experiments.data.batches import Batch

EXAMPLES = 3


class SkippedImages:
    """Counts the images that were left out, over a run and its resumptions.

    Args:
        fraction: of the images seen, up to which they may be left out.
        tolerated: up to so many may be, however few were seen.

    Example:
        >>> import torch
        >>> skipped = SkippedImages()
        >>> skipped.count(Batch(torch.ones(31, 3, 8, 8), torch.ones(31), ["train/tench/7.jpg: it is empty"]))
        >>> skipped.seen, skipped.skipped
        (32, 1)
    """

    def __init__(self, *, fraction: float = 0.01, tolerated: int = 9) -> None:
        self.fraction, self.tolerated = fraction, tolerated
        self.seen, self.skipped = 0, 0
        self.examples: list[str] = []

    def count(self, batch: Batch) -> None:
        """Count the images of a batch and those left out of it.

        Raises:
            DataError: they are now too many.
        """
        self.seen += len(batch.labels) + len(batch.skipped)
        self.skipped += len(batch.skipped)
        self.examples = (self.examples + batch.skipped)[:EXAMPLES]
        if self.skipped > max(self.tolerated, self.fraction * self.seen):
            raise DataError(
                f"{self.skipped:,} of {self.seen:,} images could not be read, expected at most "
                f"{100 * self.fraction:g} %; check or replace them: {'; '.join(self.examples)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: numbers and texts only."""
        return {"seen": self.seen, "skipped": self.skipped, "examples": list(self.examples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.seen, self.skipped, self.examples = state["seen"], state["skipped"], list(state["examples"])
