"""One reader per file format; none runs anything that a file contains."""
