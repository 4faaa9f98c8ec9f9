"""One file per output format; ``render`` of each makes a text of an examination."""
