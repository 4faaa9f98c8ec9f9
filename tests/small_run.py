"""The ``batchnorm`` command on a part of the data, with a checkpoint at every look, few evaluations and many lines.

A run of a second or two through all of the real code, to be killed, resumed and looked at. The changes are made in the
workers too, which import this file as ``__mp_main__``. With NO_MATPLOTLIB in the environment there is none.
"""

import os
import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):
    if "NO_MATPLOTLIB" in os.environ:
        sys.modules["matplotlib"] = None  # pyright: ignore[reportArgumentType]

    from batchnorm.cli import progress
    from batchnorm.experiments import mnist, training
    from batchnorm.experiments.data.mnist import Mnist, load_mnist

    def load_part(folder: Path | None, input: str) -> Mnist:
        data = load_mnist(folder, input)
        return Mnist(*(part[:3000] for part in data[:2]), *(part[:500] for part in data[2:4]), data.scale)

    mnist.load_mnist = load_part
    mnist.GRID = 5
    training.CHECKPOINT_SECONDS = 0.0
    progress.LINE_SECONDS = 0.1

if __name__ == "__main__":
    from batchnorm.cli.main import main

    main()
