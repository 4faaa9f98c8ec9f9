"""Kernels, one folder per device, imported at first use. They know neither each other nor anything of this package."""
