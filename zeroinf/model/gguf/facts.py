"""Reads the metadata of a GGUF file's architecture, without its prefix, and the shapes of tensors.

Whatever is read is remembered, so that a file that says something else is refused by name.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from zeroinf.model.gguf.header import FLOAT_TYPES, GgufHeader

_REQUIRED = object()
_LAYER = re.compile(r"blk\.(\d+)\.")


class Unknown(Exception):  # noqa: N818 - never leaves this package
    """Why no config can be made of a file."""


class GgufFacts:
    """Metadata of the architecture; remembers what was read, so that the rest can be refused."""

    def __init__(self, header: GgufHeader) -> None:
        prefix = f"{header.architecture}."
        self.tensors = header.tensors
        self._values = {key.removeprefix(prefix): v for key, v in header.metadata.items() if key.startswith(prefix)}
        self._read: set[str] = set()

    def has(self, tensor: str) -> bool:
        """Whether the file holds `tensor`, or one of that name in any layer if it is `blk.*.` and a name."""
        if not tensor.startswith("blk.*."):
            return tensor in self.tensors
        return any(name.startswith("blk.") and name.endswith(tensor[5:]) for name in self.tensors)

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`; a list of equal numbers, one a layer, is that number."""
        self._read.add(key)
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise Unknown(f"it does not say {key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            return value[0]
        return value

    def expect(self, key: str, *values: Any) -> None:
        """Refuse the file where it says anything but one of `values` of `key`."""
        if (found := self.get(key, values[0])) not in values:
            raise Unknown(f"its {key} is {found}")

    def each(self, key: str, layers: int, default: Any = _REQUIRED) -> list[Any]:
        """The values of `key` for each of so many layers."""
        value = self.get(key, default)
        return value[:layers] if isinstance(value, list) else [value] * layers

    def shape(self, tensor: str) -> tuple[int, ...]:
        if tensor not in self.tensors:
            raise Unknown(f"it has no tensor {tensor}")
        return self.tensors[tensor].shape

    def numbers(self, tensor: str) -> list[float]:
        """The elements of a small tensor in float32."""
        found = self.tensors[tensor]
        if FLOAT_TYPES.get(found.kind) != "float32":
            raise Unknown(f"its {tensor} is not in float32")
        with found.path.open("rb") as file:
            file.seek(found.offset)
            return list(struct.unpack(f"<{found.nbytes // 4}f", file.read(found.nbytes)))

    def refuse_layers_from(self, count: int) -> None:
        """Refuse the file where it holds tensors of more than `count` layers."""
        for tensor in self.tensors:
            if (layer := _LAYER.match(tensor)) is not None and int(layer[1]) >= count:
                raise Unknown(f"it says block_count {count}, and holds {tensor}")

    def refuse_unread(self) -> None:
        unread = sorted(set(self._values) - self._read)
        if unread:
            raise Unknown(f"what it says of {', '.join(unread)} is not known")
