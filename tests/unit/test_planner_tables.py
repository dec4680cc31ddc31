"""Tables that tokens read by row: on the GPU, in host memory, or in the checkpoint's files where neither has room."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_machines import CHAIN, GIB, lengths_of, machine_of, overhead, speeds, workload_of

from zeroinf.engines.stream.stream_memory import stream_terms
from zeroinf.errors import DoesNotFitError, UsageError
from zeroinf.model.anatomy import Anatomy, Table, TensorSpec
from zeroinf.planner.constraints import Constraints, check_embeddings
from zeroinf.planner.decision import Decision
from zeroinf.planner.memory import total
from zeroinf.planner.search import Planner
from zeroinf.planner.summary import limited_by
from zeroinf.planner.timing import Speeds

ROWS, WIDTH = 3 << 21, 2048
GRAMS = TensorSpec(name="blocks.3.grams", shape=(ROWS, WIDTH), dtype="bfloat16")


def with_table() -> Anatomy:
    """The chain with a table of 24 GiB in its fourth layer, of which a token reads 16 rows of 4 KiB."""
    table = Table(tensor=GRAMS.name, rows=ROWS, width=WIDTH, dtype="bfloat16", rows_per_token=16)
    blocks = [replace(block, tensors=(*block.tensors, *[GRAMS] * (block.index == 3))) for block in CHAIN.blocks]
    return replace(CHAIN, blocks=tuple(blocks), tables=(table,))


TABLED = with_table()


def choose(anatomy: Anatomy, host: int, rates: Speeds | None = None, **asked: object) -> Decision:
    planner = Planner(
        anatomy,
        machine_of(gpu_bytes=4 * GIB, host_bytes=host),
        rates or speeds(),
        stream_terms(anatomy, 1, overhead),
        workload_of,
        device="cuda",
        lengths=lengths_of(),
    )
    return planner.choose(Constraints(**asked))  # type: ignore[arg-type]


def test_rows_are_read_from_files_where_neither_the_gpu_nor_the_host_holds_the_table() -> None:
    found = choose(TABLED, 8 * GIB).chosen
    assert found.choice.embeddings == "disk"
    host = {term.name: term.nbytes for term in found.terms if term.place == "host"}
    tokens = max(found.choice.prefill_tokens, found.choice.micro_batch_rows)
    assert host["rows read from files"] == host["gathered rows, page-locked"] == tokens * 16 * WIDTH * 2
    assert total(found.terms, "host") <= 8 * GIB
    assert not total(found.terms, "disk"), "they are read where they are"


def test_host_memory_that_has_room_is_faster() -> None:
    in_memory, in_files = choose(TABLED, 64 * GIB), choose(TABLED, 64 * GIB, embeddings="disk")
    assert in_memory.chosen.choice.embeddings == "cpu"
    assert in_memory.tokens_per_second > in_files.tokens_per_second


def test_a_slow_disk_is_what_steps_wait_for() -> None:
    slow = choose(TABLED, 8 * GIB, speeds(disk_reads_per_s=1000), batch_size=64).chosen.timing
    fast = choose(TABLED, 8 * GIB, speeds(disk_reads_per_s=1e6), batch_size=64).chosen.timing
    assert slow.decode_s >= 64 * 16 * 2 / 1000 > fast.decode_s
    assert limited_by(slow, "cuda") == "decode is limited by reads of rows from the checkpoint"


def test_rows_that_cannot_be_read_by_themselves_are_not() -> None:
    pickled = replace(TABLED, unreadable_rows="its files are pickled")
    with pytest.raises(DoesNotFitError, match="host memory"):
        choose(pickled, 8 * GIB)
    with pytest.raises(UsageError, match=r"--embeddings disk: .* its files are pickled"):
        check_embeddings("disk", pickled)
    with pytest.raises(UsageError, match="no table is read by row"):
        check_embeddings("disk", CHAIN)
