"""What DeepSpeed's own codes leave of weights, and of which: the bytes that cross are in the integration tests."""

from __future__ import annotations

import pytest
from small_models import small_config

from zeroinf.engines.zero.codes import expanded_bytes, with_codes
from zeroinf.model.anatomy import TensorSpec
from zeroinf.model.inspect import build_meta, read_anatomy

GROUP = 16


def codes_of(bits: int) -> dict[str, object]:
    return {"num_bits": bits, "group_size": GROUP, "group_dim": 1, "symmetric": False}


def changed(architecture: str, bits: int) -> dict[str, tuple[TensorSpec, TensorSpec]]:
    """Tensors before and after, of those that differ."""
    config = small_config(architecture)
    whole = read_anatomy(config, dtype="bfloat16")
    coded = with_codes(whole, build_meta(config, "bfloat16"), codes_of(bits))
    pairs = zip(whole.tensors(), coded.tensors(), strict=True)
    return {before.name: (before, after) for before, after in pairs if before != after}


@pytest.mark.parametrize(("bits", "share"), [(4, 1 / 4), (8, 1 / 2)])
def test_matrices_become_codes_with_two_numbers_a_group(bits: int, share: float) -> None:
    coded = changed("llama", bits)
    assert {name.split(".")[-2] for name in coded} >= {"q_proj", "down_proj", "embed_tokens"}
    for before, after in coded.values():
        assert after.nbytes == before.nbytes * (share + 2 / GROUP)


def test_what_is_no_linear_layer_and_no_embedding_is_left_alone() -> None:
    assert set(changed("gpt2", 4)) == {"transformer.wte.weight", "transformer.wpe.weight"}  # the others are Conv1D


@pytest.mark.parametrize(("bits", "element_bytes"), [(4, 3), (8, 2)])
def test_the_largest_weight_is_there_in_full_while_it_is_made(bits: int, element_bytes: int) -> None:
    whole = read_anatomy(small_config("llama"), dtype="bfloat16")
    largest = max(tensor.numel for tensor in whole.tensors() if len(tensor.shape) == 2)
    assert expanded_bytes(whole, codes_of(bits)) == largest * element_bytes
