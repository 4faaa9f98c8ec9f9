"""One writer per file format; none changes the file that was read."""
