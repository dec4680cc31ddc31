"""Small checkpoints in the layouts of GPTQ, AWQ, FP8 and others, packed here from the published layouts, and the same
models with their weights in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from small_models import build_model, build_tokenizer

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Packed = dict[str, torch.Tensor]
Pack = Callable[[np.ndarray, np.random.Generator], tuple[Packed, np.ndarray]]
"""From a matrix (outputs, inputs) to what a checkpoint has of it, and the matrix that this stands for."""


def _grouped(weight: np.ndarray, bits: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (outputs, inputs), zero points and scales (outputs, groups), of inputs that `groups` numbers."""
    count = int(groups.max()) + 1
    zeros, scales = np.zeros((len(weight), count), dtype=np.int64), np.zeros((len(weight), count), dtype=np.float32)
    codes = np.zeros(weight.shape, dtype=np.int64)
    for group in range(count):
        own = weight[:, groups == group]
        low, high = np.minimum(own.min(1), 0), np.maximum(own.max(1), 0)
        scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
        zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
        codes[:, groups == group] = np.clip(np.round(own / scale[:, None]) + zero[:, None], 0, 2**bits - 1)
        zeros[:, group], scales[:, group] = zero, scale
    return codes, zeros, scales


def _words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """The last dimension as one row of bits each, the lowest first, cut into words of 32."""
    flat = ((codes[..., None] >> np.arange(bits)) & 1).reshape(*codes.shape[:-1], -1, 32).astype(np.uint64)
    words = (flat << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32).copy())


def gptq(bits: int, less: int, *, ordered: bool) -> Pack:
    def pack(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
        groups = np.arange(weight.shape[1]) // GROUP
        if ordered:
            groups = rng.permutation(groups)
        codes, zeros, scales = _grouped(weight, bits, groups)
        stored = (zeros.T - less) % 2**bits
        packed = {
            "qweight": _words(codes, bits).T.contiguous(),
            "qzeros": _words(stored, bits),
            "scales": torch.from_numpy(scales.T.copy()).half(),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        return packed, ((codes - zeros[:, groups]) * scales[:, groups]).astype(np.float32)

    return pack


def awq(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
    groups = np.arange(weight.shape[1]) // GROUP
    codes, zeros, scales = _grouped(weight, 4, groups)

    def shuffled(values: np.ndarray) -> torch.Tensor:
        return _words(values.reshape(len(values), -1, 8)[..., list(_AWQ_ORDER)].reshape(values.shape), 4)

    packed = {
        "qweight": shuffled(codes.T),
        "qzeros": shuffled(zeros.T),
        "scales": torch.from_numpy(scales.T.copy()).half(),
    }
    return packed, ((codes - zeros[:, groups]) * scales[:, groups]).astype(np.float32)


def fp8(scales: str) -> Pack:
    def pack(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
        value = torch.from_numpy(weight)
        rows, columns = value.shape
        height, width = {"tensor": (rows, columns), "channel": (1, columns)}.get(scales, (GROUP, GROUP))
        padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
        padded[:rows, :columns] = value
        blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        scale = blocks.abs().amax((1, 3)) / 448
        if scales in ("ue8m0", "powers"):
            scale = scale.log2().ceil().exp2()
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        full = (codes.float() * scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
        kept = scale.view(-1)[0] if scales == "tensor" else scale
        kept = kept.to(torch.float8_e8m0fnu) if scales == "ue8m0" else kept
        packed = {"weight": codes.view(padded.shape)[:rows, :columns].contiguous(), "weight_scale_inv": kept}
        return packed, full.numpy()

    return pack


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
METHODS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "gptq": (gptq(4, 1, ordered=False), _GPTQ),
    "gptq_8": (gptq(8, 1, ordered=False), {**_GPTQ, "bits": 8}),
    "gptq_3": (gptq(3, 1, ordered=False), {**_GPTQ, "bits": 3}),
    "gptq_2": (gptq(2, 1, ordered=False), {**_GPTQ, "bits": 2}),
    "gptq_v2": (gptq(4, 0, ordered=False), {**_GPTQ, "checkpoint_format": "gptq_v2"}),
    "gptq_ordered": (gptq(4, 1, ordered=True), {**_GPTQ, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "auto_round_gptq": (
        gptq(4, 1, ordered=False),
        {**_GPTQ, "quant_method": "auto-round", "data_type": "int", "packing_format": "auto_round:auto_gptq"},
    ),
    "auto_round_awq": (
        awq,
        {**_GPTQ, "quant_method": "auto-round", "data_type": "int", "packing_format": "auto_round:auto_awq"},
    ),
    "fp8": (fp8("block"), {**_FP8, "weight_block_size": [GROUP, GROUP]}),
    "fp8_ue8m0": (fp8("ue8m0"), {**_FP8, "weight_block_size": [GROUP, GROUP], "scale_fmt": "ue8m0"}),
    "fp8_powers": (fp8("powers"), {**_FP8, "weight_block_size": [GROUP, GROUP], "scale_fmt": "ue8m0"}),
    "fp8_channel": (fp8("channel"), {**_FP8, "weight_block_size": None}),
    "fp8_tensor": (fp8("tensor"), {**_FP8, "weight_block_size": None}),
}
"""How each is packed, and what its config says."""


def packed_checkpoint(name: str, method: str, folder: Path) -> Path:
    """The small model `name` in `folder`, packed as `method` but for its head and routers; in `folder/full` the model
    in full."""
    pack, marks = METHODS[method]
    rng = np.random.default_rng(0)
    model = build_model(name)
    full = folder / "full"
    model.save_pretrained(full)
    build_tokenizer().save_pretrained(full)
    tensors = load_file(full / "model.safetensors")
    packed: Packed = {}
    for called in list(tensors):
        layer, _, suffix = called.rpartition(".")
        is_router = layer.endswith((".gate", ".router", ".shared_expert_gate"))
        tensor = tensors[called]
        if suffix != "weight" or tensor.dim() != 2 or is_router or ".layers." not in layer:
            packed[called] = tensor
            continue
        own, whole = pack(tensor.float().numpy(), rng)
        packed |= {f"{layer}.{part}": value for part, value in own.items()}
        tensors[called] = torch.from_numpy(np.ascontiguousarray(whole))
    save_file(tensors, full / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((full / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": marks}))
    (folder / "generation_config.json").write_text((full / "generation_config.json").read_text())
    build_tokenizer().save_pretrained(folder)
    return folder
