"""No pass that the scheduler makes takes more GPU memory than its plan said, whatever the prompts' lengths."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fake_machines import GIB, machine_of
from generating import rows_of
from torch.nn import ModuleList

from zeroinf.generation.cache import PagePool
from zeroinf.generation.groups import Group
from zeroinf.generation.host_cache import HostCache
from zeroinf.generation.micro_batch import BatchState, TokenRules
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.scheduler import Scheduler
from zeroinf.hardware.rates import Rates
from zeroinf.model.catalog import catalog_config
from zeroinf.model.inspect import build_meta, find_blocks, read_anatomy
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.memory import COMPUTED, peak_bytes
from zeroinf.planner.plan import Plan
from zeroinf.planner.prefixes import PrefixGroups
from zeroinf.planner.workload import Lengths, Step
from zeroinf.simulation.make_plan import PlanInput, make_plan
from zeroinf.simulation.recorder import Recorder, storages_of
from zeroinf.simulation.workload import record_step

META = torch.device("meta")
MIB = 1 << 20
_FULLEST = 4


def plan_of(
    model: str, prompts: list[list[int]], new: list[int], gpu_bytes: int, host_share: float, rows: int | None
) -> Plan:
    anatomy = read_anatomy(catalog_config(model), dtype="bfloat16")
    asked = list(zip(map(len, prompts), new, strict=True))
    groups = PrefixGroups([array("i", prompt).tobytes() for prompt in prompts])
    lengths = replace(Lengths.of(anatomy, asked), prefixes=groups.shared(anatomy, asked))
    plan_input = PlanInput(
        config=catalog_config(model),
        anatomy=anatomy,
        machine=machine_of(gpu_bytes=gpu_bytes, host_bytes=64 * GIB),
        rates=Rates.of("given", link_gbps=10.0, matmul_tflops={"bfloat16": {8192: 600}}),
        constraints=Constraints(offload="cpu", requests=len(prompts), batch_size=rows, host_share=host_share),
        lengths=lengths,
        device="cuda",
    )
    return make_plan(plan_input).plan


def passes_of(plan: Plan, prompts: list[list[int]], new: list[int]) -> Iterator[list[Group]]:
    scheduler = Scheduler(Limits.of(plan, shares_passes=True, breaks_at=None), plan.anatomy.row_pages)
    scheduler.add(rows_of(prompts, new))
    while True:
        scheduler.admit()
        if not (groups := scheduler.next_pass()):
            return
        yield groups
        for group in groups:
            scheduler.advance(group)


class Paper:
    """Runs micro-batches of a plan on the meta device, each once for all that are alike."""

    def __init__(self, model: str, plan: Plan) -> None:
        self._model, self._plan = build_meta(catalog_config(model), "bfloat16"), plan
        _, blocks = find_blocks(self._model)
        self._blocks = ModuleList(blocks)
        self._seen: dict[object, Step] = {}

    def step(self, group: Group) -> Step:
        widths = group.width, min(group.counts), group.length, min(group.lengths), any(group.starts)
        alike = len(group.seats), group.on_host, sum(group.chooses), sum(group.counts) if group.is_packed else widths
        if alike not in self._seen:
            self._seen[alike] = self._run(group)
        return self._seen[alike]

    def _run(self, group: Group) -> Step:
        plan, recorder = self._plan, Recorder(storages_of(self._model), self._blocks)
        with torch.no_grad(), recorder:
            pool = PagePool(self._model, plan.anatomy, plan.pool, META)
            host = plan.host and HostCache(self._model, plan.anatomy, plan.host, META, None, pin=False)
            batch_state = BatchState(self._model, TokenRules(self._model, None, ()), pool, META, host)
            recorder.cut()
            return record_step(self._model, batch_state, group, recorder, [1.0] * len(self._blocks))


@pytest.mark.parametrize("host_share", [0.0, 1.0], ids=["keys on the GPU", "keys in host memory"])
@pytest.mark.parametrize(
    ("model", "least", "most", "requests", "gpu_mib", "rows"),
    [
        ("opt-125m", 16, 512, 60, 1800, None),
        ("pythia-70m", 1, 900, 40, 1500, None),
        # All rows are two micro-batches, those that are live before could be one larger one.
        ("pythia-70m", 190, 200, 540, 16000, 540),
    ],
)
def test_no_pass_takes_more_than_the_plan_said(
    model: str, least: int, most: int, requests: int, gpu_mib: int, rows: int | None, host_share: float
) -> None:
    draw = random.Random(requests)
    prompts = [[number] * draw.randint(least, most) for number in range(requests)]
    new = [draw.randint(2 if rows is None else 24, 24) for _ in range(requests)]
    plan = plan_of(model, prompts, new, gpu_mib * MIB, host_share, rows)
    check_passes(model, plan, prompts, new)


def test_nor_does_one_whose_rows_share_what_their_prompts_begin_with() -> None:
    draw = random.Random(1)
    prompts = [[7] * 600 + [number] * draw.randint(1, 90) for number in range(300)]
    new = [draw.randint(2, 24) for _ in prompts]
    plan = plan_of("pythia-70m", prompts, new, 1500 * MIB, 0.0, None)
    assert plan.prefixes is not None and plan.prefixes.saved_share > 0.8
    check_passes("pythia-70m", plan, prompts, new)


def check_passes(model: str, plan: Plan, prompts: list[list[int]], new: list[int]) -> None:
    planned = next(term.nbytes for term in plan.terms if term.name == COMPUTED)
    paper = Paper(model, plan)
    passes = list(passes_of(plan, prompts, new))
    if plan.forward_tokens:  # what they take follows from their tokens
        passes = sorted(passes, key=lambda groups: sum(sum(group.counts) for group in groups))[-_FULLEST:]
    most_taken = max(peak_bytes([paper.step(group) for group in groups]) for groups in passes)
    assert 0.5 * planned < most_taken <= planned
