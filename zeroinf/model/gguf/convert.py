"""Converts a GGUF file once to a checkpoint folder with full weights, layer by layer, for engines that run no packed
ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroinf.model.cache import build_once, file_digest
from zeroinf.model.gguf.folder import gguf_folder
from zeroinf.paths import cache_directory

if TYPE_CHECKING:
    import torch

# Part of the folder's name: raise it when the conversion writes something else than before.
CONVERTER_VERSION = 7
_NUMBER = re.compile(r"\.(\d+)\.")


def convert_gguf(path: Path) -> Path:
    """Convert `path` to a folder with config, safetensors weights and tokenizer; return that folder.

    Weights are expanded to the dtype that the file's config has: bfloat16 for quantized ones. Host memory holds those
    of one layer. A second call returns at once: the folder is named by a digest of all that the file holds, which is
    remembered. Raises the errors of `gguf_folder`.
    """
    packed, parts = gguf_folder(path)
    held = hashlib.sha256("".join(map(file_digest, parts)).encode()).hexdigest()
    folder = cache_directory() / "gguf" / f"{packed.name}-{held[:16]}-v{CONVERTER_VERSION}"
    return build_once(folder, partial(_convert, packed, parts))


def _convert(packed: Path, parts: Sequence[Path], folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from zeroinf.model.config import config_dtype
    from zeroinf.model.gguf.tensors import open_tensors
    from zeroinf.model.inspect import build_meta

    for file in packed.iterdir():
        shutil.copyfile(file, folder / file.name)
    described = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    marks = described.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    config = AutoConfig.from_pretrained(packed)
    config.quantization_config = {**marks, "in_full": True}
    model = build_meta(config, config_dtype(config))
    stored = {name: tensor for name, (_, tensor) in open_tensors(parts).items()}
    groups: dict[int, list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters())
    for name in parameters:
        number = _NUMBER.search(name)
        groups[int(number[1]) if number else -1].append(name)
    where: dict[str, str] = {}
    for place, names in enumerate(groups.values(), start=1):
        shard = f"model-{place:05}-of-{len(groups):05}.safetensors"
        whole = {name: _value(parameters[name], stored) for name in names}
        save_file(whole, folder / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _value(parameter: Any, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import torch

    from zeroinf.model.stored_parts import parts_of

    value = torch.empty(parameter.shape, dtype=parameter.dtype)
    for part in parts_of(parameter) or ():
        found = part.make(*(stored[name] for name in part.names)).reshape(-1)
        value.view(-1)[part.start : part.start + found.numel()] = found
    return value
