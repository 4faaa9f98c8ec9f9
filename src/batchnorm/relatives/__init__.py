"""BN's relatives in plain PyTorch: one file each, one function per equation; the oracles of their tests."""
