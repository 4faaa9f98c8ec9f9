"""The command line: each command only connects the parts of the package, and is imported when it is called."""
