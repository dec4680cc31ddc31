"""Makes the import of torch and transformers quicker, for processes that belong to zeroinf's command line.

transformers imports whatever optional package it finds, and reads all of its own source files to learn what they
define; torch reads source files to say where an operator was registered. `quicken_imports` sees to it that none of this
happens, and that TorchDynamo waits until it is needed. It changes what transformers says of other packages, so a
process of somebody else's must not call it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from zeroinf.compat.dynamo import defer_dynamo

_UNUSED = (
    "is_scipy_available",  # losses of object detection
    "is_sklearn_available",  # assisted decoding
    "is_torch_distributed_available",  # transformers' own tensor parallelism and FSDP, which need DTensor and sympy
    "is_torch_flex_attn_available",
    "is_torchvision_available",
    "is_vision_available",
)
"""Questions of `transformers.utils.import_utils` that are answered with no: text generation needs none of this."""

Structure = dict[frozenset[str], dict[str, set[str]]]
"""transformers' account of its own modules: the names that each defines, by the packages which these need."""


def quicken_imports(cache_folder: Path) -> None:
    """Let later imports of torch and transformers do less; `cache_folder` keeps what one process learns for the next.

    Relies on these, as of torch 2.11 and transformers 5.17: `torch._library.utils.get_source(n)` says "file:line" of
    its n-th caller; the functions of `_UNUSED` are called wherever transformers would import these packages, and each
    such place does without; `define_import_structure` depends on the files below `transformers/models` alone. Where one
    of these names is missing, nothing is changed.
    """
    defer_dynamo()
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    changes: dict[str, Callable[[ModuleType], None]] = {
        "torch._library.utils": _name_sources_quickly,
        "transformers.utils.import_utils": lambda module: _learn_quickly(module, cache_folder),
    }
    sys.meta_path.insert(0, _AfterImport(changes))


class _AfterImport(MetaPathFinder):
    """Changes modules by name as soon as they have been executed, before anybody can take anything out of them."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = self._changes.get(fullname)
        spec = PathFinder.find_spec(fullname, path) if change is not None else None
        if change is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def then_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = then_change  # type: ignore[method-assign]
        return spec


def _name_sources_quickly(module: ModuleType) -> None:
    if not hasattr(module, "get_source"):
        return

    def get_source(stacklevel: int) -> str:
        frame = sys._getframe(stacklevel)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"

    module.get_source = get_source  # type: ignore[attr-defined]


def _learn_quickly(module: ModuleType, cache_folder: Path) -> None:
    for name in _UNUSED:
        if hasattr(module, name):
            setattr(module, name, _no)
    if not hasattr(module, "define_import_structure"):
        return
    define = module.define_import_structure
    models = Path(str(module.__file__)).parent.parent / "models"

    @cache
    def structure() -> Structure:
        return _kept(models, cache_folder, lambda: define(str(models)))

    def define_import_structure(module_path: Any, prefix: str | None = None) -> Structure:
        if Path(module_path) not in (models, models / "__init__.py"):
            found: Structure = define(module_path, prefix)
            return found
        start = "" if prefix is None else f"{prefix}."
        return {
            needed: {f"{start}{name}": set(defined) for name, defined in modules.items()}
            for needed, modules in structure().items()
        }

    module.define_import_structure = define_import_structure  # type: ignore[attr-defined]


def _no(*ignored: object) -> bool:
    return False


def _kept(models: Path, cache_folder: Path, define: Callable[[], Structure]) -> Structure:
    """The answer of `define` for the files below `models`, read from `cache_folder` where it was asked about the same
    files before."""
    files = sorted(_files(models))
    key = hashlib.sha256(repr((sys.version_info, models, files)).encode()).hexdigest()[:32]
    kept = cache_folder / "transformers-modules" / f"{key}.json"
    try:
        return {
            frozenset(needed): {name: set(defined) for name, defined in modules.items()}
            for needed, modules in json.loads(kept.read_text(encoding="utf-8"))
        }
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or no such file
        pass
    structure = define()
    plain = [
        [sorted(needed), {name: sorted(defined) for name, defined in modules.items()}]
        for needed, modules in structure.items()
    ]
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        begun = kept.with_name(f".{key}-{os.getpid()}")
        begun.write_text(json.dumps(plain), encoding="utf-8")
        begun.replace(kept)
    except OSError:  # the next process reads the files again
        pass
    return structure


def _files(folder: str | os.PathLike[str]) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of each Python file below `folder`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                found = entry.stat()
                yield entry.path, found.st_size, found.st_mtime_ns
            elif entry.name != "__pycache__" and entry.is_dir():
                yield from _files(entry.path)
