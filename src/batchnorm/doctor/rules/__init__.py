"""One rule per file: its docstring is the page that ``batchnorm rule CODE`` prints."""
