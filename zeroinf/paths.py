"""Folders that are the user's or the project's own, wherever zeroinf is installed, and files that last."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The folder of files that can be rebuilt: `$ZEROINF_CACHE`, else `$XDG_CACHE_HOME/zeroinf`, else `~/.cache`."""
    if own := os.environ.get("ZEROINF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zeroinf"


def configs_directory() -> Path:
    """The folder `configs`: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


GUARDED_FILE, _GUARDED_FOLDER = 0o644, 0o755
"""The most that is allowed, whatever the umask, with weights that later runs find: their owner alone writes them."""


def make_guarded(folder: Path) -> None:
    """Make `folder`, and what is missing above it, such that nobody but their owner may write there."""
    for each in (*reversed(folder.parents), folder):
        each.mkdir(_GUARDED_FOLDER, exist_ok=True)


def flush(path: Path) -> None:
    """Make sure that a file's data, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
