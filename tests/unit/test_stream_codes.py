"""Weights as codes: the arithmetic, to the last bit, and where codes lie in a piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_models import build_model
from wire_reference import through_codes

from zeroinf.engines.stream import codes as codes_module
from zeroinf.engines.stream.codes import decode, encode
from zeroinf.engines.stream.expand import Expander
from zeroinf.engines.stream.tensor_groups import group_tensors
from zeroinf.planner.wire import CODES, Wire

WIRES: list[Wire] = ["int8", "int4"]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def coded(weights: torch.Tensor, wire: Wire) -> tuple[torch.Tensor, torch.Tensor]:
    kind = CODES[wire]
    codes = torch.empty(kind.nbytes(weights.numel()), dtype=torch.uint8)
    scales = torch.empty(weights.numel() // kind.group, dtype=torch.bfloat16)
    encode(weights, weights.dtype, kind, codes, scales)
    return codes, scales


def there_and_back(weights: torch.Tensor, wire: Wire) -> torch.Tensor:
    found = torch.empty_like(weights)
    decode(*coded(weights, wire), CODES[wire], found)
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("wire", WIRES)
def test_weights_come_back_as_the_arithmetic_says(wire: Wire, dtype: torch.dtype) -> None:
    weights = torch.randn(3 << 16, generator=torch.Generator().manual_seed(0)).to(dtype)  # more than one chunk
    assert torch.equal(there_and_back(weights, wire), through_codes(weights, wire))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30, 3.0, -3.0, 6e4])
def test_groups_of_one_value_keep_it(value: float, wire: Wire) -> None:
    weights = torch.full((128,), value).bfloat16()
    assert torch.allclose(there_and_back(weights, wire).float(), weights.float(), rtol=2**-7, atol=0)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=64, max_size=64), st.sampled_from(WIRES))
@example([0.0] * 62 + [997.0, -997.0], "int8")
def test_no_weight_moves_by_more_than_a_step_and_its_scales_rounding(values: list[float], wire: Wire) -> None:
    weights, kind = torch.tensor(values), CODES[wire]
    moved = (there_and_back(weights, wire) - weights).abs().view(-1, kind.group)
    step = weights.view(-1, kind.group).abs().amax(-1, keepdim=True) / (1 << (kind.bits - 1))
    scales = ((1 << (kind.bits - 1)) - 1) * 2**-9  # of a code as large as any, by bfloat16's rounding
    assert bool((moved <= (1.01 + scales) * step + 1e-35).all())


def test_where_the_device_has_no_room_turns_are_shorter_and_then_the_cpu_makes_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, turns = codes_module._encode, list[int]()

    def full(*arguments: Any) -> None:
        *_, device, chunk = arguments
        turns.append(chunk)
        if device.type != "cpu":
            raise torch.OutOfMemoryError
        made(*arguments)

    monkeypatch.setattr(codes_module, "_encode", full)
    weights, kind = torch.randn(1 << 10), CODES["int4"]
    codes = torch.empty(kind.nbytes(weights.numel()), dtype=torch.uint8)
    scales = torch.empty(weights.numel() // kind.group, dtype=torch.bfloat16)
    encode(weights, weights.dtype, kind, codes, scales, torch.device("cuda", 0))
    assert turns == sorted(turns, reverse=True) and len(set(turns)) == 3
    right_codes, right_scales = coded(weights, "int4")
    assert torch.equal(codes, right_codes) and torch.equal(scales, right_scales)


def test_four_bit_codes_take_half_a_byte_each_and_eight_bit_codes_one() -> None:
    weights = torch.ones(1 << 12)
    assert [sum(t.nbytes for t in coded(weights, wire)) for wire in WIRES] == [4096 + 128, 2048 + 256]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", ["mixtral", "gptj", "gpt2", "mamba"])
def test_what_is_written_in_a_piece_comes_out_of_the_expanded_slot(name: str, wire: Wire) -> None:
    groups, *_ = group_tensors(build_model(name), wire)
    expander = Expander(groups, torch.device("cpu"))
    for group in groups:
        wire_piece = torch.full((group.nbytes,), 7, dtype=torch.uint8)
        for tensor, target in group.targets(wire_piece, torch.device("cpu")):
            target.write(tensor.value.detach())
        expander.on(group).fill(wire_piece)
        coded = 0
        for tensor, found in group.views(expander.slot):
            is_same = torch.equal(found, tensor.value)
            assert is_same or torch.equal(found.view(-1), through_codes(tensor.value.detach(), wire).view(-1))
            coded += not is_same
        assert coded >= 3


def test_small_tensors_norms_buffers_and_short_rows_stay_as_they_are() -> None:
    groups, outside, _ = group_tensors(build_model("mamba"), "int4")
    layout = groups[0].layout
    assert layout.coded is not None
    ends = layout.coded.nbytes
    whole = {
        t.names[0].rpartition("mixer.")[2]
        for t, p in zip(groups[0].tensors, layout.locations, strict=True)
        if p.offset >= ends
    }
    assert {"A_log", "D", "conv1d.weight", "conv1d.bias"} <= whole
    assert "in_proj.weight" not in whole
    assert outside.layout.coded is None
