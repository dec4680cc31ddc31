"""Terms of a plan's memory against what the engine really makes of a model, and against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_machines import CHAIN, overhead, shape_of, workload_of
from hypothesis import given
from hypothesis import strategies as st
from recorded import repeated
from small_models import SMALL_MODELS, build_model, small_config

from zeroinf.engines.stream.layout import lay_out
from zeroinf.engines.stream.stream_memory import stream_gpu_terms, stream_host_terms
from zeroinf.engines.stream.tensor_groups import group_tensors
from zeroinf.engines.zero.zero_memory import zero_gpu_terms, zero_host_terms
from zeroinf.model.anatomy import TensorSpec
from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.allocator import LARGE_PAGE_BYTES, Allocator, Event
from zeroinf.planner.choice import Choice
from zeroinf.planner.memory import (
    ALIGNMENT,
    CHUNK_BYTES,
    PIECE_ALIGNMENT,
    Overhead,
    Term,
    piece_bytes,
    pieces,
    store_bytes,
    total,
)
from zeroinf.planner.wire import Wire
from zeroinf.planner.workload import ExpansionCost, Workload, lock_step

MIB, GIB = 1 << 20, 1 << 30
WIRES: tuple[Wire, ...] = ("model", "int8", "int4")


def choice(**changed: Any) -> Choice:
    given: dict[str, Any] = {
        "engine": "stream", "offload": "cpu", "fetch": "replicated", "batch_size": 4, "micro_batch_rows": 4,
        "prefill_tokens": 256, "resident_blocks": 0, "nvme_blocks": 0,
    }  # fmt: skip
    return Choice(**{**given, **changed})


def named(terms: tuple[Term, ...]) -> dict[str, int]:
    assert len({(term.place, term.name) for term in terms}) == len(terms), "each name stands once"
    return {term.name: term.nbytes for term in terms}


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_pieces_are_as_long_as_the_engine_lays_them_out(name: str) -> None:
    anatomy = read_anatomy(small_config(name))
    model = build_model(name)
    for wire in WIRES:
        blocks, outside, _ = group_tensors(model, wire)
        assert list(pieces(anatomy, wire)) == [group.nbytes for group in blocks]
        assert list(pieces(anatomy)) == [group.layout.nbytes for group in blocks]
        assert piece_bytes(anatomy.outside) == outside.nbytes


shapes = st.lists(st.integers(1, 40), max_size=3).map(tuple)


@given(st.lists(st.tuples(shapes, st.sampled_from(["float32", "bfloat16", "int64", "bool"])), max_size=9))
def test_any_tensors_make_a_piece_of_the_length_that_the_engine_makes(
    given: list[tuple[tuple[int, ...], str]],
) -> None:
    specs = [TensorSpec(name=str(i), shape=shape, dtype=dtype) for i, (shape, dtype) in enumerate(given)]
    tensors = [torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for shape, dtype in given]
    assert piece_bytes(specs) == lay_out(tensors).nbytes


def test_alignments_nest() -> None:
    assert CHUNK_BYTES % PIECE_ALIGNMENT == PIECE_ALIGNMENT % ALIGNMENT == 0


def test_a_store_holds_all_of_the_model_from_chunk_to_chunk() -> None:
    assert store_bytes(CHAIN) >= sum(pieces(CHAIN)) + piece_bytes(CHAIN.outside)
    assert store_bytes(CHAIN) % CHUNK_BYTES == 0


def gpu(world_size: int = 1, workload: Workload | None = None, extra: Overhead | None = None, **chosen: Any) -> Any:
    return stream_gpu_terms(
        CHAIN, choice(**chosen), workload or workload_of(shape_of(4)), world_size, extra or overhead(False)
    )


PIECE = pieces(CHAIN)[0]
BLOCKS = len(CHAIN.blocks)


@pytest.mark.parametrize(
    ("resident", "slots"), [(0, 3), (BLOCKS - 3, 3), (BLOCKS - 2, 2), (BLOCKS - 1, 1), (BLOCKS, 0)]
)
def test_there_are_no_more_slots_than_blocks_that_stream(resident: int, slots: int) -> None:
    terms = named(gpu(resident_blocks=resident))
    assert terms.get("slots", 0) == slots * PIECE
    assert terms.get("resident layers", 0) == resident * PIECE
    assert terms["embeddings, head, norms"] == piece_bytes(CHAIN.outside)


@pytest.mark.parametrize(("offload", "unit"), [("cpu", PIECE_ALIGNMENT), ("nvme", CHUNK_BYTES)])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_partitioned_slots_hold_a_part_of_every_rank(offload: str, unit: int, ranks: int) -> None:
    terms = named(gpu(ranks, offload=offload, fetch="partitioned", nvme_blocks=BLOCKS if offload == "nvme" else 0))
    part = -(-PIECE // (ranks * unit)) * unit
    assert part * ranks >= PIECE
    assert (terms["slots"], terms["staging buffers (load only)"]) == (6 * ranks * part, 4 * part)


@pytest.mark.parametrize(("wire", "share"), [("int8", 0.52), ("int4", 0.29)])
def test_codes_are_small_wherever_they_rest_and_one_slot_takes_a_block_in_full(wire: Wire, share: float) -> None:
    coded = pieces(CHAIN, wire)[0]
    assert coded <= share * PIECE
    terms = named(gpu(resident_blocks=2, wire=wire))
    assert (terms["slots"], terms["resident layers"], terms["expanded slot"]) == (3 * coded, 2 * coded, PIECE)
    assert named(gpu(wire=wire, offload="none", resident_blocks=BLOCKS))["expanded slot"] == PIECE
    assert host(wire=wire)["weights, page-locked"] == BLOCKS * coded
    assert store_bytes(CHAIN, wire) <= BLOCKS * (coded + CHUNK_BYTES) + piece_bytes(CHAIN.outside) + CHUNK_BYTES
    assert "expanded slot" not in named(gpu())


def test_a_plan_without_streams_needs_neither_slots_nor_stages() -> None:
    terms = named(gpu(4, offload="none", resident_blocks=BLOCKS))
    assert not {"slots", "staging buffers (load only)"} & set(terms)


def test_terms_of_torch_add_up_to_what_its_allocator_reserves_but_for_a_page() -> None:
    workload, extra = workload_of(shape_of(4, 2)), overhead(False)
    held = [piece_bytes(CHAIN.outside), PIECE, PIECE, PIECE, extra.workspace[0]]
    allocator = Allocator()
    allocator.replay(Event(-1000 - index, nbytes) for index, nbytes in enumerate(held))
    allocator.replay(workload.cache)
    for _ in range(2):
        allocator.replay(repeated(workload.passes))
    beside = ("CUDA context", "collectives' buffers", "unforeseen")
    inside = sum(nbytes for name, nbytes in named(gpu(workload=workload, extra=extra)).items() if name not in beside)
    assert 0 <= inside - allocator.usage.reserved <= LARGE_PAGE_BYTES


def test_a_pass_holds_the_inputs_of_all_its_micro_batches_and_what_one_of_them_computes() -> None:
    one, four = (gpu(workload=workload_of(shape_of(4, rows, 1))) for rows in (4, 1))
    activations = "activations, logits, states"
    assert named(four)[activations] < named(one)[activations]
    split = workload_of(shape_of(4, 1))
    order = lock_step(split.last_decode)
    assert [event.nbytes is None for event in order] == [False] * 4 + [False, False, True, True] * 4 + [True] * 4
    assert len({event.key for event in order}) == 3 * 4


def test_each_use_has_its_own_name_and_origin() -> None:
    extra = Overhead(context=(7 * MIB, "measured"), workspace=(8 * MIB, "data sheet"), collectives=(9 * MIB, "assumed"))
    origins = {term.name: (term.nbytes, term.origin) for term in gpu(2, fetch="partitioned", extra=extra)}
    assert origins["CUDA context"] == (7 * MIB, "measured")
    assert origins["matrix product workspaces"] == (8 * MIB, "data sheet")
    assert origins["collectives' buffers"] == (9 * MIB, "assumed")
    assert origins["KV cache"][1] == "simulated"
    assert origins["slots"][1] == "counted"


def host(world_size: int = 1, process: Overhead | None = None, **chosen: Any) -> dict[str, int]:
    return named(stream_host_terms(CHAIN, choice(**chosen), world_size, process or overhead(False)))


def test_the_host_holds_each_block_once_whatever_the_number_of_ranks() -> None:
    for ranks in (1, 8):
        assert host(ranks)["weights, page-locked"] == BLOCKS * PIECE
    assert host(resident_blocks=5, nvme_blocks=4)["weights, page-locked"] == (BLOCKS - 9) * PIECE
    assert "weights, page-locked" not in host(nvme_blocks=BLOCKS)


@pytest.mark.parametrize(("fetch", "copies"), [("replicated", 4), ("partitioned", 1)])
def test_what_comes_from_a_disk_passes_through_three_buffers_a_rank(fetch: str, copies: int) -> None:
    ring = host(4, offload="nvme", fetch=fetch, nvme_blocks=BLOCKS)["NVMe read ring, page-locked"]
    assert 3 * copies * PIECE <= ring <= 3 * (copies * PIECE + 4 * CHUNK_BYTES)
    assert "NVMe read ring, page-locked" not in host(4, fetch=fetch)


def test_what_stays_on_the_gpu_passes_through_the_host_and_not_beside_the_ring() -> None:
    stages, outside = "staging buffers (load only)", piece_bytes(CHAIN.outside)
    largest = max(outside, PIECE)
    assert host()[stages] == outside
    assert host(resident_blocks=1)[stages] == largest + PIECE
    assert host(resident_blocks=5)[stages] == host(resident_blocks=2)[stages] == largest + 2 * PIECE
    assert host(offload="nvme", nvme_blocks=1).get(stages, 0) == max(0, outside - 3 * PIECE)


@pytest.mark.parametrize("resident", [0, 5, BLOCKS])
def test_weights_that_transformers_handles_take_host_memory_while_they_are_loaded(resident: int) -> None:
    def counted(loads: Any) -> int:
        terms = stream_host_terms(replace(CHAIN, loads=loads), choice(resident_blocks=resident), 1, overhead(False))
        return sum(term.nbytes for term in terms if term.origin == "counted")

    largest = max(PIECE, piece_bytes(CHAIN.outside))
    assert counted("piece by piece") - counted("in place") == 3 * largest
    assert CHAIN.weight_bytes < counted("as a whole") < CHAIN.weight_bytes + 8 * largest


def test_every_rank_is_a_process() -> None:
    processes = "processes with their libraries"
    assert host(4)[processes] == 4 * host(1)[processes]
    assert host(1, Overhead(process=(GIB, "measured")))[processes] == GIB


def test_zero_rounds_page_locked_weights_up_to_powers_of_two() -> None:
    terms = named(zero_host_terms(CHAIN, "cpu", 1, overhead(False), 0))
    weights = [tensor.nbytes for tensor in CHAIN.tensors() if not tensor.is_buffer]
    expected = 0
    for nbytes in weights:
        power = 1
        while power < nbytes:
            power *= 2
        expected += power
    assert terms["weights or read pool, page-locked"] == expected >= sum(weights)


def test_zero_counts_its_pool_on_each_rank_and_no_weights_where_none_rest() -> None:
    locked = "weights or read pool, page-locked"
    assert named(zero_host_terms(CHAIN, "nvme", 2, overhead(False), 3 * MIB))[locked] == 2 * 4 * MIB
    assert locked not in named(zero_host_terms(CHAIN, "none", 2, overhead(False), 0))


def test_zero_counts_live_weights_with_their_gaps_and_those_that_stay() -> None:
    workload = workload_of(shape_of(4))
    terms = zero_gpu_terms(8 * GIB, 2 * GIB, workload, overhead(False))
    assert named(terms)["live weights"] == 8 * GIB
    assert named(terms)["weights that stay"] == 2 * GIB
    assert total(terms, "gpu") > 10 * GIB + sum(event.nbytes or 0 for event in workload.cache)
    assert total(terms, "host") == 0
    expanding = replace(workload, expansion=ExpansionCost(nbytes=GIB, kernels=()))
    coded = zero_gpu_terms(8 * GIB, 2 * GIB, expanding, overhead(False))
    assert named(coded)["a weight made of its codes"] == GIB
    assert total(coded, "gpu") == pytest.approx(total(terms, "gpu") + GIB, abs=20 * MIB)
