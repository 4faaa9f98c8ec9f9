"""``python -m batchnorm``, as ``torchrun -m`` needs it."""

from batchnorm.cli.main import main

main()
