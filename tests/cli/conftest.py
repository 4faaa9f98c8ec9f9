"""What holds for every command."""

import sys
from pathlib import Path

import pytest

from small_network import save, trained


@pytest.fixture(autouse=True)
def own_import_path(monkeypatch: pytest.MonkeyPatch):
    """Folders that a command adds for the user's code are gone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a pyproject.toml but the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def healthy(own_folder: None) -> str:
    save(Path("net.pt"), trained().state_dict())
    return "net.pt"


@pytest.fixture
def lost(own_folder: None) -> str:
    """What TensorFlow's saver of trainable variables does, in torch: the running statistics are not in the file."""
    save(Path("lost.pt"), dict(trained().named_parameters()))
    return "lost.pt"
