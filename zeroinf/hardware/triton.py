"""Checks whether Triton can compile kernels here, without importing it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

_COMPILERS = ("gcc", "clang", "cc")


def why_no_kernels() -> str:
    """The reason why Triton cannot compile kernels for this machine's GPUs; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    chosen = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([chosen] if chosen else _COMPILERS)):
        return f"Triton finds no C compiler ({chosen or ', '.join(_COMPILERS)})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Triton finds no Python.h (python3-dev)"
    return ""
