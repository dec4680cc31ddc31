"""Reads the header of a GGUF file: its metadata, and where each tensor lies in which part.

The format is ggml's (`docs/gguf.md` in the repository of ggml), versions 2 and 3, little-endian. Weights are not read.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from zeroinf.errors import ModelError

FLOAT_TYPES = {0: "float32", 1: "float16", 30: "bfloat16"}
"""Types of tensors that hold numbers, as torch calls them, by the number that files give them."""

_BLOCK_SIZES = {
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84), 11: (256, 110), 12: (256, 144),
    13: (256, 176), 14: (256, 210), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 29: (256, 56), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36),
}  # fmt: skip
"""Weights of a block and the bytes it takes, of quantized types that can be expanded."""

_FLOAT_SIZES = {0: 4, 1: 2, 30: 2}
_SPLIT = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """The location of a tensor: `offset` in bytes from the start of `path`; `shape` has the row's length last."""

    path: Path
    shape: tuple[int, ...]
    kind: int
    """Its type, by ggml's number."""
    offset: int
    nbytes: int

    @property
    def held_dtype(self) -> str:
        """The dtype of its numbers; uint8 where they are quantized."""
        return FLOAT_TYPES.get(self.kind, "uint8")

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Its shape; where it is quantized, rows are so many bytes."""
        if self.kind in FLOAT_TYPES:
            return self.shape
        return (*self.shape[:-1], self.nbytes // max(1, prod(self.shape[:-1])))


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All parts of one file. Metadata has numbers, strings and lists of numbers; of lists of strings, their length."""

    parts: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def read_gguf(path: Path) -> GgufHeader:
    """The header of `path` and of its other parts, if it is split.

    Raises ModelError for files that are damaged, cut off or lack a part, and for tensors of types that are not known.
    """
    parts = _parts(path)
    found = [_read_part(part) for part in parts]
    tensors: dict[str, GgufTensor] = {}
    for _, own in found:
        if twice := sorted(tensors.keys() & own.keys()):
            raise ModelError(f"two parts of {path} hold {twice[0]}", hint="fetch them again")
        tensors |= own
    metadata = found[0][0]
    count = metadata.get("split.count", 1)
    if max(1, count) != len(parts):
        raise ModelError(f"{path} says that it has {count} parts, its name says {len(parts)}", hint="rename it back")
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ModelError(f"the parts of {path} hold {len(tensors)} tensors of {total}", hint="fetch them again")
    if "general.architecture" not in metadata:
        raise ModelError(f"{path} does not name its architecture", hint="fetch the file again")
    return GgufHeader(parts, metadata, tensors)


def _parts(path: Path) -> tuple[Path, ...]:
    match = _SPLIT.match(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(
            f"{path.name} is part {int(match['part'])} of {count}, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it",
            hint="fetch all parts into one folder",
        )
    return tuple(parts)


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            return _parse(path, memory, len(memory))
    except (ValueError, struct.error, UnicodeDecodeError, IndexError, OverflowError, MemoryError) as error:
        raise ModelError(
            f"{path} cannot be read as GGUF: {error}", hint="is the file complete? Fetch it again"
        ) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _parse(path: Path, memory: mmap.mmap, size: int) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if memory[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, pairs = struct.unpack_from("<IQQ", memory, 4)
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3")
    cursor = _Cursor(memory, 24)
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    table = []
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.number("I")
        shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
        table.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment
    found = {}
    for name, shape, kind, offset in table:
        nbytes = _nbytes(path, name, shape, kind)
        if start + offset + nbytes > size:
            raise ValueError(f"{name} would end behind its end")
        if name in found:
            raise ValueError(f"it holds {name} twice")
        found[name] = GgufTensor(path, shape, kind, start + offset, nbytes)
    return metadata, found


def _nbytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    if kind in _FLOAT_SIZES:
        return prod(shape) * _FLOAT_SIZES[kind]
    if kind not in _BLOCK_SIZES:
        raise ModelError(
            f"{path} holds {name} in ggml's type {kind}, which is not known to be expanded exactly",
            hint="take a file in Q4_K_M, Q6_K, Q8_0 or another K-, IQ- or legacy type",
        )
    weights, nbytes = _BLOCK_SIZES[kind]
    if not shape or shape[-1] % weights:
        raise ValueError(f"the rows of {name} do not fill their blocks")
    return prod(shape) // weights * nbytes


class _Cursor:
    """Reads one thing after the other from `memory`."""

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory, self.at = memory, at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._memory, self.at)
        self.at += struct.calcsize(f"<{code}")
        return _shortest(value) if code == "f" else value

    def string(self) -> str:
        start, end = self._string()
        return self._memory[start:end].decode()

    def _string(self) -> tuple[int, int]:
        length = self.number("Q")
        start = self.at
        if length > len(self._memory) - start:
            raise ValueError("a string would end behind its end")
        self.at = start + length
        return start, self.at

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind] if kind in _SCALARS else _unknown(kind))
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(count):
                self._string()
            return count
        code = _SCALARS[inner] if inner in _SCALARS else _unknown(inner)
        values = struct.unpack_from(f"<{count}{code}", self._memory, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return [_shortest(value) if code == "f" else value for value in values]


def _unknown(kind: int) -> str:
    raise ValueError(f"it holds a value of type {kind}")


def _shortest(value: float) -> float:
    """The shortest number that is `value` in float32: 1e-05, not 9.999999747378752e-06."""
    return next(short for digits in range(6, 10) if _single(short := float(f"{value:.{digits}g}")) == value)


def _single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
