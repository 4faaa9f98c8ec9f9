"""Readers of data sets, and the bundled MNIST database (LeCun, Cortes, Burges)."""
