"""What a training step and an evaluation get, prepared ahead by processes of one thread each."""

import atexit
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batchnorm.errors import BatchNormError, RunError
from batchnorm.experiments.data.augmentation import Augmentation
from batchnorm.experiments.data.crops import center_crop
from batchnorm.experiments.data.image_set import Images, UnreadableImageError
from batchnorm.experiments.data.shuffling import Order, seed_of
from batchnorm.experiments.workers import MALLOC, interrupts_held

if TYPE_CHECKING:
    from PIL import Image  # pyright: ignore[reportMissingImports]

# Batches that wait, per process
PREFETCH = 2


class Batch(NamedTuple):
    """Images that belong together.

    ``images``: float32 (m, 3, size, size) in [-1, 1], or (m, crops, 3, size, size). ``labels``: int64 (m,).
    ``skipped`` says which images were left out of the batch, and why: m is smaller by so many.
    """

    images: Tensor
    labels: Tensor
    skipped: list[str]


class TrainBatches(Dataset[Batch]):
    """Shuffled, cropped and distorted images: a batch depends on the settings and its step alone.

    Args:
        images: the training set.
        size: height and width of the network's input, in pixels.
        batch_size: images per process and step.
        seed: of the run.
        within_shards: whether the images of a shard change places from epoch to epoch; see :func:`epoch_order`.
        distortion: "full", "reduced" or "none"; see :class:`Augmentation`.
        flip: whether images are mirrored.
        rank: of this process, from 0; the processes share the images of a step.
        world_size: number of processes.
        channels_last: how the images of a batch lie in memory; here it costs the training process nothing.

    Raises:
        DataError: the images do not fill one step.
        MissingExtraError: kornia or Pillow is not installed.

    Example:
        >>> from batchnorm.experiments.data.images import mnist_images
        >>> digits = mnist_images().train
        >>> batches = TrainBatches(digits, size=28, batch_size=32, seed=0, flip=False)
        >>> batches.steps_per_epoch, batches[5].images.shape
        (1875, torch.Size([32, 3, 28, 28]))
        >>> batches[5].images.equal(batches[5].images)
        True
    """

    def __init__(
        self,
        images: Images,
        *,
        size: int,
        batch_size: int,
        seed: int,
        within_shards: bool = True,
        distortion: str = "full",
        flip: bool = True,
        rank: int = 0,
        world_size: int = 1,
        channels_last: bool = False,
    ) -> None:
        self.images, self.seed, self.rank = images, seed, rank
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.augmentation = Augmentation(size, distortion=distortion, flip=flip)
        self.order = Order(
            images.shard_sizes,
            seed=seed,
            batch_size=batch_size,
            within_shards=within_shards,
            rank=rank,
            world_size=world_size,
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def __getitem__(self, step: int) -> Batch:
        images, labels, skipped = load(self.images, self.order.step(step))
        batch = self.augmentation(images, seed_of(self.seed, step, self.rank))
        return Batch(batch.contiguous(memory_format=self.memory_format), labels, skipped)


class EvalBatches(Dataset[Batch]):
    """All images in their own order, not distorted; the last batch may be smaller.

    Args:
        images: the validation set.
        size: height and width of the network's input, in pixels.
        batch_size: images per batch.
        crops: what is taken of each image: :func:`center_crop` or :func:`crops_144`.

    Example:
        >>> from batchnorm.experiments.data.images import mnist_images
        >>> batches = EvalBatches(mnist_images().val, size=28, batch_size=64)
        >>> len(batches), batches[0].labels[:4].tolist(), batches[156].images.shape
        (157, [7, 2, 1, 0], torch.Size([16, 3, 28, 28]))
    """

    def __init__(
        self,
        images: Images,
        *,
        size: int,
        batch_size: int,
        crops: "Callable[[Image.Image, int], Tensor]" = center_crop,
    ) -> None:
        self.images, self.size, self.batch_size, self.crops = images, size, batch_size, crops

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of {len(self)}")
        first = step * self.batch_size
        images, labels, skipped = load(self.images, range(first, min(first + self.batch_size, len(self.images))))
        crops = [self.crops(image, self.size) for image in images]
        return Batch(torch.stack(crops) if crops else torch.empty(0, 3, self.size, self.size), labels, skipped)


def load(images: Images, indices: Iterable[int]) -> "tuple[list[Image.Image], Tensor, list[str]]":
    """The images that can be read, their labels, and which cannot."""
    loaded: list[Image.Image] = []
    labels: list[int] = []
    skipped: list[str] = []
    for index in indices:
        try:
            loaded.append(images.load(index))
        except UnreadableImageError as error:
            skipped.append(str(error))
        else:
            labels.append(int(images.labels[index]))
    return loaded, torch.tensor(labels, dtype=torch.int64), skipped


class Loader:
    """Batches prepared ahead of time by processes of their own.

    The processes start when the first batch is asked for. Asked in ascending order, batches come from those that wait;
    any other step begins anew there. The random state of this process is left as it is.

    Args:
        dataset: what makes the batches.
        workers: processes, of one thread each; 0 prepares each batch when it is asked for, in this process.

    Example:
        >>> from batchnorm.experiments.data.images import mnist_images
        >>> loader = Loader(EvalBatches(mnist_images().val, size=28, batch_size=2), workers=0)
        >>> loader.batch(0).labels
        tensor([7, 2])
        >>> loader.close()
    """

    def __init__(self, dataset: TrainBatches | EvalBatches, workers: int = 1) -> None:
        self.dataset, self.workers = dataset, workers
        self.steps = Steps(len(dataset) if isinstance(dataset, EvalBatches) else None)
        self.next_step = -1
        self.loader: DataLoader[Batch | BatchNormError] | None = None
        self.iterator: Iterator[Batch | BatchNormError] = iter(())

    def batch(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            DataError: a shard cannot be read.
            RunError: a process was killed, or ran out of memory.
            IndexError: an evaluation has no such batch.
        """
        if self.workers == 0:
            return self.dataset[step]
        result: Batch | BatchNormError
        try:
            result = self.take(step)
        except StopIteration:
            raise IndexError(f"batch {step} of {self.steps.stop}") from None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            result = RunError(
                f"a process that prepares images ended unexpectedly: {str(error).splitlines()[0].rstrip('. ')}; it was "
                "killed, or memory or shared memory (/dev/shm) ran out; continue with --resume"
            )
        self.next_step = step + 1
        if isinstance(result, RunError):
            # Not while torch's exception keeps its iterator, and that its processes, alive
            self.close()
        if isinstance(result, BatchNormError):
            raise result
        return result

    def take(self, step: int) -> Batch | BatchNormError:
        """What the processes have made of a step."""
        while True:
            try:
                if step != self.next_step:
                    self.begin(step)
                # Until the batch is here: after an exception, the iterator is one step further
                self.next_step = -1
                return next(self.iterator)
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                # A process that died can no longer hand over what it announced; torch then finds out which one it was
                if str(error).startswith("Caught "):
                    raise

    def begin(self, step: int) -> None:
        self.steps.start = step
        if self.loader is None:
            # A batch is made of tensors of some megabytes, of which page faults would cost a tenth of the time
            for name, value in MALLOC.items():
                os.environ.setdefault(name, value)
            self.loader = DataLoader(
                Caught(self.dataset),
                batch_size=None,
                sampler=self.steps,
                num_workers=self.workers,
                prefetch_factor=PREFETCH,
                persistent_workers=True,
                worker_init_fn=begin_process,
                # Forked processes would inherit locks that threads of this one hold
                multiprocessing_context="spawn",
                # The default draws from the global generator, and a resumed run would go on with other numbers
                generator=torch.Generator(),
            )
        with interrupts_held(), child_signals_kept():
            self.iterator = iter(self.loader)
        self.next_step = step

    def close(self) -> None:
        """End the processes. Asked for another batch, the loader starts them again."""
        # torch ends them when its iterator is gone
        self.iterator, self.loader, self.next_step = iter(()), None, -1


class Steps:
    """The steps from ``start`` on."""

    def __init__(self, stop: int | None) -> None:
        self.start, self.stop = 0, stop

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start) if self.stop is None else iter(range(self.start, self.stop))


class Caught(Dataset["Batch | BatchNormError"]):
    """Our errors as values: torch would add the worker's traceback to the message."""

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Batch | BatchNormError:
        try:
            return self.dataset[step]
        except BatchNormError as error:
            return error


def begin_process(worker: int) -> None:
    """Let a process end at once: where a thread hands over a batch meanwhile, Python's own way out aborts in C++."""
    atexit.register(os._exit, 0)


@contextmanager
def child_signals_kept() -> Iterator[None]:
    """Keep torch's handler of SIGCHLD out: it raises wherever this process happens to be when a worker has died.

    Without it the next batch says so, after 5 seconds at most.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
