"""What holds for every command."""

import sys

import pytest


@pytest.fixture(autouse=True)
def own_import_path(monkeypatch: pytest.MonkeyPatch):
    """Folders that a command adds for the user's code are gone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
