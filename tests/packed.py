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
from transformers import AutoModelForImageTextToText

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
        if scales in ("ue8m0", "powers", "deepseek"):
            scale = scale.log2().ceil().exp2()
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        full = (codes.float() * scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
        kept = scale.view(-1)[0] if scales == "tensor" else scale
        kept = kept.to(torch.float8_e8m0fnu) if scales in ("ue8m0", "deepseek") else kept
        called = "scale" if scales == "deepseek" else "weight_scale_inv"
        packed = {"weight": codes.view(padded.shape)[:rows, :columns].contiguous(), called: kept}
        return packed, full.numpy()

    return pack


def integers(bits: int, *, symmetric: bool, ordered: bool = False, group: int = GROUP) -> Pack:
    """compressed-tensors' `pack-quantized`."""

    def pack(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
        rows, columns = weight.shape
        groups = np.arange(columns) // (group or columns)
        if ordered:
            groups = rng.permutation(groups)
        codes, zeros, scales = _grouped(weight, bits, groups)
        if symmetric:
            zeros[:] = 1 << (bits - 1)
        padded = np.pad(codes, ((0, 0), (0, -columns * bits % 32 // bits)))
        packed = {
            "weight_packed": _words(padded, bits),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            packed["weight_zero_point"] = _words(
                np.pad(zeros.T, ((0, 0), (0, -rows * bits % 32 // bits))), bits
            ).T.contiguous()
        if ordered:
            packed["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return packed, ((codes - zeros[:, groups]) * scales[:, groups]).astype(np.float32)

    return pack


def bytes_of(kind: torch.dtype) -> Pack:
    """compressed-tensors' `int-quantized` and `float-quantized`, a scale a row."""

    def pack(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
        value = torch.from_numpy(weight)
        top = 127 if kind == torch.int8 else 448
        scale = value.abs().amax(1, keepdim=True) / top
        codes = (value / scale).round().to(kind) if kind == torch.int8 else (value / scale).to(kind)
        packed = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
        return packed, (codes.float() * scale).numpy()

    return pack


_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp4(layout: str) -> Pack:
    """NVFP4 as compressed-tensors or ModelOpt have it, or MXFP4, also as DeepSeek-V4's experts are stored."""

    def pack(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
        size = 32 if layout in ("mx", "deepseek") else 16
        value = torch.from_numpy(weight)
        groups = value.view(len(value), -1, size)
        most = groups.abs().amax(-1) / 6
        if size == 32:
            powers = most.log2().ceil()
            scale, stored = powers.exp2(), {"weight_scale": (powers + 127).to(torch.uint8)}
        else:
            of_all = most.max() / 448
            eight = (most / of_all).to(torch.float8_e4m3fn)
            scale = eight.float() * of_all
            stored = {"weight_scale": eight, "weight_scale_2": of_all}
            if layout == "tensors":
                inverse = (1 / of_all).view(1)
                scale = eight.float() / inverse
                stored = {"weight_scale": eight, "weight_global_scale": inverse}
        scaled = groups / scale[..., None].clamp(min=1e-30)
        index = (scaled.abs()[..., None] - _FP4).abs().argmin(-1)
        codes = (index + 8 * (scaled < 0)).view(value.shape)
        full = (_FP4[index] * torch.where(scaled < 0, -1.0, 1.0) * scale[..., None]).view(value.shape)
        name = "weight" if layout == "modelopt" else "weight_packed"
        stored[name] = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
        if layout == "deepseek":
            powers_of_two = stored["weight_scale"].view(torch.float8_e8m0fnu)
            stored = {"weight": stored[name].view(torch.int8), "scale": powers_of_two}
        return stored, full.numpy()

    return pack


# QLoRA's NF4 (Dettmers et al., 2023), appendix E, and bitsandbytes' FP4, both with 1 as the farthest value.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BNB_FP4 = (0.0, 0.00520833, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)


def bnb(kind: str, *, nested: bool) -> Pack:
    def pack(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
        table = np.array(_NF4 if kind == "nf4" else [*_BNB_FP4, *(-value for value in _BNB_FP4)], dtype=np.float32)
        blocks = weight.reshape(-1, 64)
        most = np.abs(blocks).max(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "shape": list(weight.shape), "dtype": "float32"}
        packed: Packed = {}
        if nested:
            offset = float(most.mean())
            count = -(-len(most) // 256)
            shares = np.pad(most - offset, (0, count * 256 - len(most))).reshape(count, 256)
            top = np.abs(shares).max(1).astype(np.float32)
            grid = np.linspace(-1, 1, 256, dtype=np.float32)
            codes = np.abs(shares[..., None] / top[:, None, None] - grid).argmin(-1).reshape(-1)[: len(most)]
            most = grid[codes] * np.repeat(top, 256)[: len(most)] + np.float32(offset)
            state |= {"nested_blocksize": 256, "nested_offset": float(np.float32(offset)), "nested_dtype": "float32"}
            packed |= {"weight.nested_absmax": torch.from_numpy(top), "weight.nested_quant_map": torch.from_numpy(grid)}
        packed["weight.absmax"] = torch.from_numpy(codes.astype(np.uint8) if nested else most)
        index = np.abs(blocks[..., None] / most[:, None, None] - table).argmin(-1).astype(np.uint8).reshape(-1)
        packed["weight"] = torch.from_numpy((index[0::2] << 4) | index[1::2])[:, None]
        packed["weight.quant_map"] = torch.from_numpy(table)
        said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        packed[f"weight.quant_state.bitsandbytes__{kind}"] = said
        return packed, (table[index.reshape(-1, 64)] * most[:, None]).reshape(weight.shape)

    return pack


def bnb_int8(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
    value = torch.from_numpy(weight)
    most = value.abs().amax(1)
    codes = (value * 127 / most[:, None]).round().to(torch.int8)
    packed = {"weight": codes, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return packed, (codes.float() * most[:, None] * 7.874015718698502e-3).numpy()


def torchao(kind: str) -> Pack:
    """torchao's tensor classes as its safetensors have them: Int8Tensor with a scale a row, IntxUnpackedToInt8Tensor
    with groups, Float8Tensor, Int4Tensor, and Int4TilePackedTo4dTensor, whose tiles are filled one weight at a time."""

    def pack(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
        rows, columns = weight.shape
        if kind == "float8":
            scale = np.abs(weight).max(1, keepdims=True) / 448
            codes = torch.from_numpy(weight / scale).to(torch.float8_e4m3fn)
            packed = {"_weight_qdata": codes, "_weight_scale": torch.from_numpy(scale)}
            return packed, codes.float().numpy() * scale
        groups = np.arange(columns) // (columns if kind == "int8" else GROUP)
        codes, zeros, scales = _grouped(weight, 8 if kind == "int8" else 4, groups)
        middle = 128 if kind == "int8" else 8
        if kind in ("int8", "intx"):
            packed = {
                "_weight_qdata": torch.from_numpy((codes - middle).astype(np.int8)),
                "_weight_scale": torch.from_numpy(scales),
                "_weight_zero_point": torch.from_numpy((zeros - middle).astype(np.int8)),
            }
            return packed, ((codes - zeros[:, groups]) * scales[:, groups]).astype(np.float32)
        lowest = ((middle - zeros) * scales).astype(np.float32)
        full = ((codes - middle).astype(np.float32) * scales[:, groups] + lowest[:, groups]).astype(np.float32)
        if kind == "int4":
            pairs = (codes - middle) & 15
            packed = {
                "_weight_qdata": torch.from_numpy((pairs[:, 0::2] | pairs[:, 1::2] << 4).astype(np.uint8)),
                "_weight_scale": torch.from_numpy(scales.T.copy()),
                "_weight_zero_point": torch.from_numpy(lowest.T.copy()),
            }
            return packed, full
        width = -(-columns // 128) * 128
        words = np.zeros((rows // 8, width // 128, 32, 4), np.uint32)
        for lane in range(32):
            for pair in range(4):
                for place, across in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
                    at = np.arange(0, width, 128) + 32 * pair + across + 2 * (lane % 4)
                    of_lane = np.pad(codes, ((0, 0), (0, width - columns)))[lane // 4 :: 8][:, at]
                    words[:, :, lane, pair] |= of_lane.astype(np.uint32) << np.uint32(4 * place)
        pad = ((0, 0), (0, width // GROUP - scales.shape[1]))
        both = np.stack([np.pad(scales, pad).T, np.pad(lowest, pad).T], -1)
        packed = {
            "_weight_qdata": torch.from_numpy(words.view(np.int32)),
            "_weight_scale_and_zero": torch.from_numpy(np.ascontiguousarray(both, np.float32)),
        }
        return packed, full

    return pack


def hqq(bits: int, axis: int, group: int = GROUP) -> Pack:
    """HQQ's, whose codes are packed along the first dimension of a matrix of groups."""

    def pack(weight: np.ndarray, rng: np.random.Generator) -> tuple[Packed, np.ndarray]:
        groups = weight.reshape(-1, group) if axis else weight.reshape(group, -1)
        low, high = groups.min(axis, keepdims=True), groups.max(axis, keepdims=True)
        scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
        zero = (-low / scale).astype(np.float16).astype(np.float32)
        codes = np.clip(np.round(groups / scale + zero), 0, 2**bits - 1).astype(np.int64)
        count = 10 if bits == 3 else 8 // bits
        padded = np.pad(codes, ((0, -len(codes) % count), (0, 0))).reshape(count, -1, codes.shape[1])
        shifts = bits * np.arange(count - 1, -1, -1)[:, None, None]
        packed = {
            "W_q": torch.from_numpy((padded << shifts).sum(0).astype(np.int32 if bits == 3 else np.uint8)),
            "scale": torch.from_numpy(scale).half(),
            "zero": torch.from_numpy(zero).half(),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "shape": torch.tensor(weight.shape),
        }
        return packed, ((codes - zero) * scale).astype(np.float32).reshape(weight.shape)

    return pack


def _tensors(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}}},
    }


def _torchao(kind: str, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": fields}}}


def _hqq(bits: int, axis: int) -> dict[str, Any]:
    settings = {"nbits": bits, "group_size": GROUP, "axis": axis, "channel_wise": True, "view_as_float": False}
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": settings}, "skip_modules": ["lm_head"]}


_IN_GROUPS = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": GROUP}}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
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
    "w4a16": (integers(4, symmetric=True), _tensors("pack-quantized", symmetric=True, group_size=GROUP)),
    "w4a16_asymmetric": (integers(4, symmetric=False), _tensors("pack-quantized", symmetric=False, group_size=GROUP)),
    "w8a16_asymmetric": (
        integers(8, symmetric=False),
        _tensors("pack-quantized", symmetric=False, group_size=GROUP, num_bits=8),
    ),
    "w4a16_channel": (
        integers(4, symmetric=False, group=0),
        _tensors("pack-quantized", symmetric=False, strategy="channel"),
    ),
    "w4a16_ordered": (
        integers(4, symmetric=False, ordered=True),
        _tensors("pack-quantized", symmetric=False, group_size=GROUP, actorder="group"),
    ),
    "w8": (bytes_of(torch.int8), _tensors("int-quantized", symmetric=True, strategy="channel", num_bits=8)),
    "w8_float": (
        bytes_of(torch.float8_e4m3fn),
        _tensors("float-quantized", symmetric=True, strategy="channel", num_bits=8, type="float"),
    ),
    "nvfp4": (fp4("tensors"), _tensors("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)),
    "mxfp4": (fp4("mx"), _tensors("mxfp4-pack-quantized", type="float", strategy="group", group_size=32)),
    "modelopt_nvfp4": (fp4("modelopt"), {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}),
    "bnb_nf4": (bnb("nf4", nested=False), {**_BNB, "bnb_4bit_quant_type": "nf4"}),
    "bnb_nf4_nested": (
        bnb("nf4", nested=True),
        {**_BNB, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "bnb_fp4": (bnb("fp4", nested=False), {**_BNB, "bnb_4bit_quant_type": "fp4"}),
    "bnb_int8": (bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8": (fp8("block"), {**_FP8, "weight_block_size": [GROUP, GROUP]}),
    "fp8_ue8m0": (fp8("ue8m0"), {**_FP8, "weight_block_size": [GROUP, GROUP], "scale_fmt": "ue8m0"}),
    "fp8_powers": (fp8("powers"), {**_FP8, "weight_block_size": [GROUP, GROUP], "scale_fmt": "ue8m0"}),
    "fp8_experts_fp4": (
        fp8("deepseek"),
        {**_FP8, "weight_block_size": [GROUP, GROUP], "scale_fmt": "ue8m0", "expert_dtype": "fp4"},
    ),
    "fp8_channel": (fp8("channel"), {**_FP8, "weight_block_size": None}),
    "fp8_tensor": (fp8("tensor"), {**_FP8, "weight_block_size": None}),
    **{f"hqq_{bits}": (hqq(bits, 1), _hqq(bits, 1)) for bits in (1, 2, 3, 4, 8)},
    "hqq_axis_0": (hqq(4, 0), _hqq(4, 0)),
    "torchao_int8": (torchao("int8"), _torchao("Int8WeightOnlyConfig")),
    "torchao_intx": (torchao("intx"), _torchao("IntxWeightOnlyConfig", granularity=_IN_GROUPS)),
    "torchao_float8": (torchao("float8"), _torchao("Float8WeightOnlyConfig")),
    "torchao_int4": (torchao("int4"), _torchao("Int4WeightOnlyConfig", group_size=GROUP)),
    "torchao_tiles": (
        torchao("tiles"),
        _torchao(
            "Int4WeightOnlyConfig",
            group_size=GROUP,
            int4_packing_format={"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"},
        ),
    ),
}
"""How each is packed, and what its config says."""


_OF_TENSORS = "compressed-tensors, "
NAMES = {
    "gptq": "gptq in 4 bits",
    "gptq_8": "gptq in 8 bits",
    "gptq_3": "gptq in 3 bits",
    "gptq_2": "gptq in 2 bits",
    "gptq_v2": "gptq, version 2",
    "gptq_ordered": "gptq with desc_act",
    "awq": "awq (gemm)",
    "auto_round_gptq": "auto-round, packed as auto_gptq",
    "auto_round_awq": "auto-round, packed as auto_awq",
    "w4a16": f"{_OF_TENSORS}int4 in groups",
    "w4a16_asymmetric": f"{_OF_TENSORS}int4 with zero points",
    "w8a16_asymmetric": f"{_OF_TENSORS}int8 with zero points",
    "w4a16_channel": f"{_OF_TENSORS}int4, a scale a row",
    "w4a16_ordered": f"{_OF_TENSORS}int4 with actorder",
    "w8": f"{_OF_TENSORS}int8, a scale a row",
    "w8_float": f"{_OF_TENSORS}fp8, a scale a row",
    "nvfp4": f"{_OF_TENSORS}nvfp4",
    "mxfp4": f"{_OF_TENSORS}mxfp4",
    "modelopt_nvfp4": "modelopt, nvfp4",
    "bnb_nf4": "bitsandbytes, nf4",
    "bnb_nf4_nested": "bitsandbytes, nf4 with double quantization",
    "bnb_fp4": "bitsandbytes, fp4",
    "bnb_int8": "bitsandbytes, int8 (activations full)",
    "fp8": "fp8 in blocks",
    "fp8_ue8m0": "fp8 in blocks, scales in ue8m0",
    "fp8_powers": "fp8 in blocks, scales in float32 that are powers of two (scale_fmt ue8m0)",
    "fp8_experts_fp4": "fp8 in blocks, experts in fp4 (expert_dtype)",
    "fp8_channel": "fp8, a scale a row",
    "fp8_tensor": "fp8, one scale",
    **{f"hqq_{bits}": f"hqq in {bits} bit{'s' if bits > 1 else ''}" for bits in (1, 2, 3, 4, 8)},
    "hqq_axis_0": "hqq, groups along outputs (axis 0)",
    "torchao_int8": "torchao, int8, a scale a row",
    "torchao_intx": "torchao, int1 to int8 in groups, a byte each",
    "torchao_float8": "torchao, float8, a scale a row",
    "torchao_int4": "torchao, int4 in groups",
    "torchao_tiles": "torchao, int4 in tiles of tinygemm",
}
"""What readers call each."""


_OF_EXPERTS = {"fp8_experts_fp4": fp4("deepseek")}
"""How experts are packed where that is another way."""


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
        own_pack = _OF_EXPERTS.get(method, pack) if ".experts." in layer else pack
        own, whole = own_pack(tensor.float().numpy(), rng)
        packed |= {f"{layer}.{part}": value for part, value in own.items()}
        tensors[called] = torch.from_numpy(np.ascontiguousarray(whole))
    save_file(tensors, full / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((full / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": marks}))
    (folder / "generation_config.json").write_text((full / "generation_config.json").read_text())
    build_tokenizer().save_pretrained(folder)
    return folder


def kimi_checkpoint(folder: Path, config: Any) -> Path:
    """A small Kimi-K2.5 with names as its makers give them, experts in int4 and all else in full, and a config that
    says so of the text model alone; in `folder/full` the model in full, as transformers saves it."""
    torch.manual_seed(0)
    pack, marks = METHODS["w4a16"]
    rng, full = np.random.default_rng(0), folder / "full"
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(full)
    tensors, stored = load_file(full / "model.safetensors"), Packed()
    for called in list(tensors):
        name = called.replace("language_model.model.blocks", "language_model.model.layers")
        name = name.removeprefix("model.")
        if ".experts." not in name:
            stored[name] = tensors[called]
            continue
        own, whole = pack(tensors[called].numpy(), rng)
        stored |= {name.replace("weight", part, 1): value for part, value in own.items()}
        tensors[called] = torch.from_numpy(np.ascontiguousarray(whole))
    save_file(tensors, full / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    ignored = ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up)_proj.*", "re:vision_tower.*"]
    fields = json.loads((full / "config.json").read_text())
    fields["text_config"]["quantization_config"] = {**marks, "ignore": [*ignored, "lm_head", "re:mm_projector.*"]}
    (folder / "config.json").write_text(json.dumps(fields))
    for place in (folder, full):
        build_tokenizer().save_pretrained(place)
    return folder


def fill_codes(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Random codes for experts that hold them as products read them, with scales near one, and random biases."""
    for name, parameter in module.named_parameters():
        held = parameter.data
        if name.endswith(("_blocks", "_zeros")):
            held.view(torch.uint8).random_(0, 256, generator=generator)
        elif held.dtype == torch.uint8:
            held.random_(120, 124, generator=generator)
        else:
            values = torch.randn(held.shape, generator=generator, device=held.device)
            held.copy_(values * 0.2 if name.endswith("_bias") else values.abs() * 0.1 + 0.05)
