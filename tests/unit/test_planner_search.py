"""The choice on machines of any size: what fits is found, what is asked for is obeyed, more never gives less."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from fake_machines import (
    CHAIN,
    GIB,
    MIB,
    NEW,
    PROMPT,
    lengths_of,
    machine_of,
    overhead,
    pool_bytes,
    speeds,
    workload_of,
)
from hypothesis import given
from hypothesis import strategies as st
from tiers import tiered

from zeroinf.engines.stream.stream_memory import stream_terms
from zeroinf.errors import DoesNotFitError
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.decision import Candidate, Decision
from zeroinf.planner.memory import Overhead, store_bytes, total
from zeroinf.planner.pass_shapes import MOST_MICRO_BATCH_ROWS, MOST_ROWS
from zeroinf.planner.search import Planner
from zeroinf.planner.timing import Speeds
from zeroinf.planner.workload import Shape, Workload

BLOCKS = len(CHAIN.blocks)
# Tokens/s are compared to three digits, so that noise does not decide.
ROUNDING = 0.006


@dataclass(frozen=True, kw_only=True)
class Box:
    """What of a machine matters to the choice. Without GPU memory it has no GPU."""

    gpu: int
    host: int
    disk: int | None = None
    ranks: int = 1


@cache
def simulated(shape: Shape, prompt: int = PROMPT) -> Workload:
    return workload_of(shape, prompt=prompt)


def choose(box: Box, *, prompt: int = PROMPT, rates: Speeds | None = None, **wished: Any) -> Decision:
    machine = machine_of(gpus=box.ranks if box.gpu else 0, gpu_bytes=box.gpu, host_bytes=box.host)
    planner = Planner(
        CHAIN,
        machine,
        rates or speeds(),
        stream_terms(CHAIN, box.ranks, overhead if box.gpu else lambda gathers: Overhead()),
        lambda shape: simulated(shape, prompt),
        device="cuda" if box.gpu else "cpu",
        lengths=lengths_of(prompt),
    )
    return planner.choose(Constraints(world_size=box.ranks, nvme_space_bytes=box.disk, **wished))


def fits(box: Box, **asked: Any) -> Decision | None:
    try:
        return choose(box, **asked)
    except DoesNotFitError:
        return None


def every(decision: Decision | None) -> tuple[Candidate, ...]:
    """All candidates; none where nothing fits."""
    return () if decision is None else (decision.chosen, *decision.alternatives, *decision.tried)


def speed(decision: Decision | None) -> float:
    return decision.chosen.timing.tokens_per_second if decision else 0.0


def rows(decision: Decision | None) -> int:
    return decision.chosen.choice.batch_size if decision else 0


def between(least: float, most: float) -> st.SearchStrategy[int]:
    """GiB, in bytes."""
    return st.integers(int(least * GIB) // MIB, int(most * GIB) // MIB).map(lambda number: number * MIB)


# The model is 0.45 GiB, a process takes 2.5 GiB of the host and half a GiB of its GPU.
gpu_sizes, host_sizes = between(0.25, 12), between(2, 16)
disks = st.none() | between(0, 1)
boxes = st.builds(Box, gpu=gpu_sizes, host=host_sizes, disk=disks, ranks=st.sampled_from([1, 2, 4]))


def with_a_folder(box: Box, offload: str, fetch: str) -> tuple[Box, dict[str, str]]:
    if offload == "nvme" and box.disk is None:
        box = replace(box, disk=GIB)
    return box, {"offload": offload, "fetch": fetch}


ways = st.builds(
    with_a_folder, boxes, st.sampled_from(["none", "cpu", "nvme"]), st.sampled_from(["replicated", "partitioned"])
)


@given(boxes)
def test_nothing_that_is_offered_needs_more_than_there_is(box: Box) -> None:
    decision = fits(box)
    for candidate in every(decision):
        assert total(candidate.terms, "gpu") <= box.gpu
        assert total(candidate.terms, "host") <= box.host
        assert total(candidate.terms, "disk") <= (box.disk or 0)
    for rejected in decision.rejected if decision else ():
        assert all(shortage.needed_bytes > shortage.available_bytes for shortage in rejected.shortages)


def test_where_memory_binds_what_is_left_is_less_than_a_hundredth_of_the_rows() -> None:
    gpu = 3 * GIB
    chosen = choose(Box(gpu=gpu, host=16 * GIB), offload="none").chosen
    rows, growing = chosen.choice.batch_size, sum(term.nbytes for term in chosen.terms if term.grows)
    assert rows > 400
    assert gpu - total(chosen.terms, "gpu") < growing / 100


@pytest.mark.parametrize("step", tiered((128 * MIB, 16 * MIB), (128 * MIB,)))
def test_as_host_memory_shrinks_a_disk_takes_over_before_nothing_fits(step: int) -> None:
    sizes = range(6 * GIB, 2 * GIB, -step)
    found = [fits(Box(gpu=0, host=size, disk=GIB), batch_size=64) for size in sizes]
    least = max(index for index, decision in enumerate(found) if decision)
    assert None not in found[: least + 1]
    assert {decision.chosen.choice.offload for decision in found if decision} == {"none", "nvme"}


@pytest.mark.parametrize("together", [None, 100])
def test_no_micro_batch_grows_beyond_the_most_rows_that_run_together(together: int | None) -> None:
    for gpu in range(3 * GIB, 5 * GIB, GIB // 8):
        chosen = choose(Box(gpu=gpu, host=16 * GIB), offload="none", micro_batch_rows=together).chosen.choice
        assert chosen.micro_batch_rows <= (together or MOST_MICRO_BATCH_ROWS)


@given(boxes, gpu_sizes)
def test_more_gpu_memory_never_gives_fewer_tokens(box: Box, other: int) -> None:
    small, large = sorted((box.gpu, other))
    assert speed(fits(replace(box, gpu=large))) >= speed(fits(replace(box, gpu=small))) * (1 - ROUNDING)


@given(boxes, host_sizes)
def test_more_host_memory_never_gives_fewer_tokens(box: Box, other: int) -> None:
    small, large = sorted((box.host, other))
    assert speed(fits(replace(box, host=large))) >= speed(fits(replace(box, host=small))) * (1 - ROUNDING)


def largest(box: Box, way: dict[str, str], **more: Any) -> int:
    """Rows of the largest micro-batch that was found to fit one way; 0 where none does."""
    decision = fits(box, **way, **more)
    return max((candidate.choice.batch_size for candidate in decision.tried), default=0) if decision else 0


@given(ways, gpu_sizes)
def test_more_gpu_memory_never_gives_a_smaller_batch(drawn: tuple[Box, dict[str, str]], other: int) -> None:
    box, way = drawn
    small, large = sorted((box.gpu, other))
    assert largest(replace(box, gpu=large), way) >= largest(replace(box, gpu=small), way)


@given(ways, host_sizes)
def test_more_host_memory_never_gives_a_smaller_batch(drawn: tuple[Box, dict[str, str]], other: int) -> None:
    box, way = drawn
    small, large = sorted((box.host, other))
    assert largest(replace(box, host=large), way) >= largest(replace(box, host=small), way)


@given(ways, st.integers(1, 256), st.integers(1, 256))
def test_a_longer_prompt_never_gives_a_larger_batch(drawn: tuple[Box, dict[str, str]], one: int, other: int) -> None:
    box, way = drawn
    short, long = sorted((one, other))
    assert largest(box, way, prompt=long) <= largest(box, way, prompt=short)


@given(ways, st.none() | st.integers(1, 300))
def test_what_the_user_fixed_is_obeyed_or_refused(drawn: tuple[Box, dict[str, str]], batch: int | None) -> None:
    box, way = drawn
    decision = fits(box, **way, batch_size=batch)
    for candidate in every(decision):
        assert candidate.choice.offload == way["offload"]
        assert batch is None or candidate.choice.batch_size == batch
        if box.ranks > 1 and way["offload"] != "none":
            assert candidate.choice.fetch == way["fetch"]


@given(boxes, st.integers(0, BLOCKS + 3))
def test_residents_that_the_user_fixed_are_obeyed(box: Box, resident: int) -> None:
    decision = fits(box, offload="cpu", resident_blocks=resident)
    if decision is None:
        return
    assert all(candidate.choice.resident_blocks == min(resident, BLOCKS) for candidate in every(decision))


@given(ways)
def test_the_batch_found_fits_and_a_few_rows_more_do_not(drawn: tuple[Box, dict[str, str]]) -> None:
    box, way = drawn
    most = largest(box, way)
    assert (fits(box, **way, batch_size=max(most, 1)) is not None) == (most > 0)
    assert fits(box, **way, batch_size=most + most // 32 + 2) is None or most == MOST_ROWS


@given(boxes)
def test_the_chosen_one_is_the_fastest_of_all_that_were_weighed(box: Box) -> None:
    decision = fits(box)
    if decision is None:
        return
    assert speed(decision) >= max(one.timing.tokens_per_second for one in every(decision)) * (1 - ROUNDING)


@given(boxes)
def test_blocks_lie_in_exactly_one_place_and_a_disk_only_where_there_is_one(box: Box) -> None:
    decision = fits(box)
    for one in (candidate.choice for candidate in every(decision)):
        assert 0 <= one.resident_blocks <= BLOCKS - one.nvme_blocks <= BLOCKS
        assert (one.nvme_blocks > 0) == (one.offload == "nvme")
        assert one.offload != "nvme" or box.disk is not None
        assert (one.resident_blocks == BLOCKS) == (one.offload == "none")
        assert one.fetch == "replicated" or (box.ranks > 1 and one.offload != "none")


@given(boxes, st.integers(1, 50))
def test_no_more_rows_run_together_than_there_are_requests(box: Box, requests: int) -> None:
    decision = fits(box, requests=requests)
    if decision is None:
        return
    assert rows(decision) <= -(-requests // box.ranks)


_MORE = re.compile(r"([\d.]+) GiB more (GPU memory|host memory|disk space)")


@given(boxes)
def test_what_the_hint_says_would_do_does(box: Box) -> None:
    try:
        choose(box)
    except DoesNotFitError as error:
        assert error.exit_code == 3
        words, _, offload = (error.hint or "").partition(" would do for --offload ")
        added = {place: int(float(more) * GIB) for more, place in _MORE.findall(words)}
        assert added, error.hint
        larger = Box(
            gpu=box.gpu + added.get("GPU memory", 0),
            host=box.host + added.get("host memory", 0),
            disk=None if box.disk is None else box.disk + added.get("disk space", 0),
            ranks=box.ranks,
        )
        assert fits(larger, offload=offload) is not None
        if list(added) == ["host memory"] and offload == "cpu":  # it is the least, but for what rounding adds
            smaller = replace(larger, host=larger.host - int(0.02 * GIB))
            assert fits(smaller, offload=offload) is None


def test_the_host_memory_that_is_missing_leaves_layers_on_the_gpu_that_have_room_there() -> None:
    box = next(
        box
        for box in (Box(gpu=1 * GIB, host=size * GIB // 8, disk=None, ranks=1) for size in range(64, 0, -1))
        if fits(box) is None
    )
    with pytest.raises(DoesNotFitError) as caught:
        choose(box)
    ((missing, place),) = _MORE.findall(caught.value.hint or "")
    assert place == "host memory"
    assert float(missing) <= 1 / 8 + 0.01  # with an eighth of a GiB more, something fits


ROOMY = Box(gpu=8 * GIB, host=16 * GIB)


def test_a_busy_neighbour_leaves_less() -> None:
    machine = machine_of(gpu_bytes=8 * GIB, free_bytes=2 * GIB, host_bytes=16 * GIB)
    planner = Planner(
        CHAIN, machine, speeds(), stream_terms(CHAIN, 1, overhead), simulated, device="cuda", lengths=lengths_of()
    )
    decision = planner.choose(Constraints())
    assert decision.budgets["gpu"] == 2 * GIB
    assert rows(decision) == rows(choose(replace(ROOMY, gpu=2 * GIB)))


def test_the_fullest_gpu_decides_for_all() -> None:
    machine = machine_of(gpus=2, gpu_bytes=8 * GIB, host_bytes=16 * GIB)
    busy = replace(machine.gpus[1], free_bytes=3 * GIB, other_bytes=5 * GIB)
    planner = Planner(
        CHAIN,
        replace(machine, gpus=(machine.gpus[0], busy)),
        speeds(),
        stream_terms(CHAIN, 2, overhead),
        simulated,
        device="cuda",
        lengths=lengths_of(),
    )
    assert planner.choose(Constraints(world_size=2)).budgets["gpu"] == 3 * GIB


def test_what_a_cgroup_leaves_is_all_there_is() -> None:
    machine = machine_of(gpu_bytes=8 * GIB, host_bytes=16 * GIB)
    limited = replace(machine.memory, available_bytes=3 * GIB, cgroup_limit_bytes=4 * GIB)
    planner = Planner(
        CHAIN,
        replace(machine, memory=limited),
        speeds(),
        stream_terms(CHAIN, 1, overhead),
        simulated,
        device="cuda",
        lengths=lengths_of(),
    )
    with pytest.raises(DoesNotFitError, match=r"host memory, 3\.00 GiB are there"):
        planner.choose(Constraints())


def test_a_host_too_small_for_the_weights_keeps_some_of_them_on_the_gpu() -> None:
    decision = choose(Box(gpu=8 * GIB, host=int(3.75 * GIB)), offload="cpu")
    assert decision.chosen.choice.resident_blocks >= 4


def test_a_host_too_small_for_the_weights_keeps_some_of_them_on_the_disk() -> None:
    decision = choose(Box(gpu=GIB, host=int(3.75 * GIB), disk=GIB))
    choice = decision.chosen.choice
    assert choice.offload == "nvme"
    assert 0 < choice.nvme_blocks < BLOCKS
    assert {rejected.offload for rejected in decision.rejected} >= {"none"}


def test_asked_for_a_disk_all_that_streams_comes_from_it() -> None:
    assert choose(replace(ROOMY, disk=GIB), offload="nvme").chosen.choice.nvme_blocks > 0
    forced = choose(replace(ROOMY, disk=GIB), offload="nvme", resident_blocks=2).chosen.choice
    assert (forced.resident_blocks, forced.nvme_blocks) == (2, BLOCKS - 2)


def test_a_full_disk_is_refused_with_what_it_lacks() -> None:
    room = store_bytes(CHAIN) - 1
    with pytest.raises(DoesNotFitError, match="on the disk") as caught:
        choose(replace(ROOMY, disk=room), offload="nvme")
    assert "GiB more disk space would do for --offload nvme" in (caught.value.hint or "")
    assert fits(replace(ROOMY, disk=room + 1), offload="nvme") is not None


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
@pytest.mark.parametrize("linked", [True, False])
def test_partitioned_needs_gpus_that_reach_each_other(offload: str, linked: bool) -> None:
    decision = choose(replace(ROOMY, ranks=4, disk=GIB), offload="cpu", gpus_are_linked=linked)
    assert ("partitioned" in {one.choice.fetch for one in every(decision)}) == linked


def test_without_a_gpu_everything_is_host_memory() -> None:
    decision = choose(Box(gpu=0, host=6 * GIB, ranks=2), batch_size=4)
    assert set(decision.budgets) == {"host"}
    assert {term.place for term in decision.chosen.terms} == {"host"}
    assert {t.name: t.nbytes for t in decision.chosen.terms}["KV cache"] == 2 * pool_bytes(4)


@pytest.mark.parametrize(
    ("rates", "binds"),
    [
        ({}, "link"),
        ({"link_gbps": 1000.0, "gather_gbps": 0.1}, "all-gather"),
        ({"link_gbps": 1e6, "gather_gbps": 1e6, "hbm_gbps": 1e6, "tflops": 1e-3}, "arithmetic"),
        ({"link_gbps": 1e6, "gather_gbps": 1e6, "tflops": 1e6, "hbm_gbps": 0.1}, "GPU memory"),
        (
            {"link_gbps": 1e6, "gather_gbps": 1e6, "tflops": 1e6, "hbm_gbps": 1e6, "model_launch_s": 1.0},
            "kernel launches",
        ),
    ],
)
def test_what_binds_is_what_is_slowest(rates: dict[str, float], binds: str) -> None:
    decision = choose(
        replace(ROOMY, ranks=2),
        offload="cpu",
        fetch="partitioned",
        resident_blocks=0,
        batch_size=2,
        rates=speeds(**rates),
    )
    assert decision.chosen.timing.binds == binds


def test_a_slow_disk_binds() -> None:
    decision = choose(
        replace(ROOMY, disk=GIB), offload="nvme", resident_blocks=0, batch_size=2, rates=speeds(disk_gbps=0.5)
    )
    assert decision.chosen.timing.binds == "disk"
    assert decision.chosen.timing.decode_s == pytest.approx(BLOCKS * 33_562_624 / 0.5e9, rel=0.01)


def test_codes_stream_in_the_time_of_their_bytes_and_their_expansion_is_counted() -> None:
    def plan(wire: str, rate: float, resident: int = 0) -> Candidate:
        given: dict[str, Any] = {"offload": "cpu", "batch_size": 2, "wire": wire, "resident_blocks": resident}
        return choose(ROOMY, rates=speeds(link_gbps=rate, hbm_gbps=50, model_launch_s=1e-9), **given).chosen

    plain, coded = plan("model", 1), plan("int4", 1)
    assert coded.choice.wire == "int4"
    assert coded.timing.streamed_bytes < 0.29 * plain.timing.streamed_bytes
    assert coded.timing.decode_s == pytest.approx(plain.timing.decode_s * 0.2825, rel=0.02)
    coded, plain = plan("int4", 1000, BLOCKS - 1), plan("model", 1000, BLOCKS - 1)
    traffic = BLOCKS * 33_562_624 * 1.28 / 50e9  # of residents, too
    assert traffic < coded.timing.prefill_s - plain.timing.prefill_s < 2 * traffic


faster = st.sampled_from(["link_gbps", "disk_gbps", "gather_gbps", "tflops", "hbm_gbps"])


@given(boxes, faster, st.floats(1, 100))
def test_a_faster_machine_is_never_slower(box: Box, name: str, factor: float) -> None:
    usual = speeds()
    quick = replace(usual, **{name: getattr(usual, name) * factor})
    assert speed(fits(box, rates=quick)) >= speed(fits(box)) * (1 - ROUNDING)


def refused(act: Callable[[], Any]) -> str:
    with pytest.raises(DoesNotFitError) as caught:
        act()
    return caught.value.message


def test_why_each_way_does_not_fit_is_said() -> None:
    message = refused(lambda: choose(Box(gpu=GIB // 4, host=16 * GIB, disk=GIB)))
    assert message.startswith("nothing fits, GPU memory is short: offload none: 1 sequence needs")
    assert "offload cpu: 1 sequence needs" in message
    assert "100 sequences need" in refused(lambda: choose(replace(ROOMY, gpu=GIB), batch_size=100))


# Keys and values in host memory


def test_rows_rest_in_host_memory_where_weights_take_longer_than_their_keys_and_values() -> None:
    slow, box = speeds(link_gbps=2.0), Box(gpu=GIB, host=64 * GIB)
    on_gpu, free = (
        choose(box, rates=slow, offload="cpu", resident_blocks=0, host_share=share) for share in (0.0, "auto")
    )
    assert on_gpu.chosen.choice.host_rows == 0
    assert free.chosen.choice.host_rows > 0
    assert free.chosen.choice.batch_size > on_gpu.chosen.choice.batch_size
    assert speed(free) > 1.03 * speed(on_gpu)
    assert {"KV cache on its way", "KV cache, page-locked"} <= {one.name for one in free.chosen.terms}


def test_host_memory_takes_no_rows_that_it_cannot_hold() -> None:
    decision = choose(Box(gpu=2 * GIB, host=4 * GIB), rates=speeds(link_gbps=2.0), offload="cpu", host_share="auto")
    assert total(decision.chosen.terms, "host") <= 4 * GIB


def test_all_rows_rest_where_the_user_says() -> None:
    box = Box(gpu=8 * GIB, host=64 * GIB)
    chosen = choose(box, offload="cpu", batch_size=24, host_share=1.0).chosen
    assert (chosen.choice.host_rows, chosen.pool.pages) == (24, 0)
    assert chosen.host is not None
    assert chosen.host.tokens == 24 * (PROMPT + NEW)
    assert chosen.timing.fetched_bytes > 0
    assert choose(box, offload="cpu", batch_size=24).chosen.host is None


def test_keys_and_values_of_codes_cross_the_link_in_less_time() -> None:
    box = Box(gpu=8 * GIB, host=64 * GIB)
    whole, codes = (
        choose(box, prompt=1024, offload="cpu", batch_size=96, host_share=1.0, kv_dtype=dtype).chosen
        for dtype in ("model", "int8")
    )
    assert codes.timing.fetched_bytes < 0.6 * whole.timing.fetched_bytes
    assert codes.timing.decode_s < whole.timing.decode_s
