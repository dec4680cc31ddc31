"""Writes JSON files atomically, and describes the first problem of an invalid one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import ValidationError


def write_whole(path: Path, text: str) -> None:
    """Put `text` in place of the file, which nobody ever sees half written; its folder is made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, with its key: `machine.gpus.0.vram: unknown key`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    unknown = first["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    return f"{where}: {'unknown key' if unknown else first['msg']}" if where else first["msg"]
