"""Jobs spread over the cores as processes of one thread each."""

import ctypes
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from batchnorm.errors import RunError

POLL_SECONDS = 0.2

# glibc gives large tensors back to the kernel at every free, and page faults cost 7 % of a step of the MNIST stack;
# with these it keeps them.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
}

_progress: Any = None
_stop: Any = None


def run_jobs(
    run: Callable[..., Any],
    jobs: Sequence[tuple[str, tuple[Any, ...]]],
    *,
    workers: int,
    on_progress: Callable[[str, int], None],
) -> dict[str, Any]:
    """Run ``run(*arguments)`` for every named job, ``workers`` at a time, and return the results by name.

    Inside a job, :func:`report_progress` and :func:`should_stop` talk to this process.

    Raises:
        RunError: a worker died, killed or out of memory.
        KeyboardInterrupt: after every job has been asked to stop and has stopped.

        Whatever a job raises is raised here, after the others have been stopped.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in MALLOC.items()})
    context = multiprocessing.get_context("spawn")
    # Without a lock, which a worker that is killed could leave taken
    queue, stop = context.SimpleQueue(), context.RawValue(ctypes.c_bool, False)
    pool = ProcessPoolExecutor(
        max(1, min(workers, len(jobs))), mp_context=context, initializer=begin_worker, initargs=(queue, stop)
    )
    with interrupts_noted() as interrupts, pool:
        try:
            with interrupts_held():
                futures = {name: pool.submit(run, *arguments) for name, arguments in jobs}
                # The pool watches the processes it had when something was last submitted, and that is one too few
                pool.submit(int)
            pending: set[Future[Any]] = set(futures.values())
            while pending:
                done, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
                while not queue.empty():
                    on_progress(*queue.get())
                for future in done:
                    future.result()
                if interrupts:
                    raise KeyboardInterrupt
            return {name: future.result() for name, future in futures.items()}
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process ended unexpectedly (killed, or out of memory); continue with --resume"
            ) from error
        finally:
            stop.value = True
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """A list that grows with every Ctrl-C, instead of an exception wherever the pool happens to be."""
    interrupts: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends. Processes started inside never see one, not even while they start."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(queue: Any, stop: Any) -> None:
    """Prepare a worker: one thread, Ctrl-C left to the parent, and nothing for the collector to walk over."""
    global _progress, _stop
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    import torch

    torch.set_num_threads(1)
    _progress, _stop = queue, stop
    gc.collect()
    gc.freeze()


def end_with_parent() -> None:
    """Wait for the parent to go, however it ends, and end at once: an idle worker would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def report_progress(name: str, step: int) -> None:
    """Tell the parent how far a job is."""
    _progress.put((name, step))


def should_stop() -> bool:
    """Whether the parent wants the job to save and end."""
    return _stop.value
