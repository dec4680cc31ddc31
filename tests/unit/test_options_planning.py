"""What was asked of a run, put to the planner with a machine that is only said to be there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fake_gpu import GIB, gpu_of, machine_of
from simulating import shared_simulations
from small_models import build_tokenizer, small_config
from transformers import AutoModelForCausalLM

from zeroinf.cli.main import cli
from zeroinf.distributed.world import World
from zeroinf.engines.stream.store import data_file, header_file, source_key, store_folder
from zeroinf.errors import DoesNotFitError, UsageError
from zeroinf.generation.masks import Masks
from zeroinf.generation.row import Sampling
from zeroinf.hardware.machine import Disk, Machine
from zeroinf.hardware.rates import Rates
from zeroinf.jobs.tokenizing import groups_of, lengths_of
from zeroinf.jobs.work_list import request_bytes
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.identity import weights_identity
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.model.source import ModelSource
from zeroinf.options import planning
from zeroinf.options.contradictions import engine_of
from zeroinf.options.options import PlanOptions, RunOptions
from zeroinf.options.plan_input import plan_input_of
from zeroinf.options.planning import plan_run
from zeroinf.planner.kv import check_kv_attention, host_share
from zeroinf.planner.memory import MASKS, pieces, store_bytes, total
from zeroinf.planner.plan import Plan
from zeroinf.planner.workload import Lengths
from zeroinf.runs.prepare import prepare, read_job
from zeroinf.simulation.make_plan import make_plan
from zeroinf.structured.matcher import WORD_BITS, Vocabulary

BLOCKS = 12  # more than a ring of read buffers holds
ALONE, TWO, APART = World(), World(size=2, local_size=2), World(size=2, local_size=1)
LENGTHS = Lengths(prompt_tokens=20, new_tokens=8)


def folder_on_disk(path: Path) -> Disk:
    return Disk(
        path=path, exists=True, writable=True, free_bytes=100 * GIB, total_bytes=100 * GIB, filesystem="", o_direct=True
    )


Ask = Callable[..., Plan]


@pytest.fixture(scope="module", autouse=True)
def _models_are_simulated_once() -> Iterator[None]:
    with shared_simulations():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    config, folder = small_config("llama"), tmp_path_factory.mktemp("llama")
    config.num_hidden_layers = BLOCKS
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return resolve_model(str(folder))


@pytest.fixture(scope="module")
def anatomy(source: ModelSource) -> Anatomy:
    return read_anatomy(source.config, dtype="float32")


@pytest.fixture
def ask(source: ModelSource, anatomy: Anatomy, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`ask(on=..., world=..., linked=..., **options)`: the plan on that machine."""

    def found(
        *,
        on: Machine | None = None,
        world: World = ALONE,
        linked: bool = True,
        requests: int = 4,
        device: str = "cuda",
        lengths: Lengths = LENGTHS,
        **options: Any,
    ) -> Plan:
        here = on or machine_of(*(gpu_of(),) * world.size)
        monkeypatch.setattr(
            planning, "read_machine", lambda paths: replace(here, disks=tuple(map(folder_on_disk, paths)))
        )
        monkeypatch.setattr(planning, "read_profile", lambda machine: Rates())
        monkeypatch.setattr(planning, "gpus_are_linked", lambda count: linked)
        monkeypatch.setattr(planning, "plan_with_measured_rates", lambda plan_input, say: make_plan(plan_input).plan)
        asked = RunOptions(model=source.name, sampling=Sampling(max_new_tokens=8), **options)
        return plan_run(asked, source, anatomy, lengths, requests, world, device)[0]

    return found


# Engine and fetch


def options_with(engine: str, own_config: bool) -> RunOptions:
    zero_config = Path("zero.json") if own_config else None
    return RunOptions(model="m", sampling=Sampling(max_new_tokens=1), engine=engine, zero_config=zero_config)


@pytest.mark.parametrize(
    ("asked", "own_config", "engine", "why"),
    [
        ("auto", False, "stream", None),
        ("auto", True, "zero", "--zero-config configures DeepSpeed's ZeRO"),
        ("zero", False, "zero", None),
        ("zero", True, "zero", None),
        ("stream", False, "stream", None),
        ("resident", False, "resident", None),
    ],
)
def test_auto_takes_the_stream_engine_unless_it_says_why(
    asked: str, own_config: bool, engine: str, why: str | None
) -> None:
    assert engine_of(options_with(asked, own_config)) == (engine, why)


def test_the_stream_engine_is_refused_by_name_for_what_it_does_not_do() -> None:
    with pytest.raises(UsageError, match="--engine stream: --zero-config configures DeepSpeed"):
        engine_of(options_with("stream", own_config=True))


@pytest.mark.parametrize(
    ("asked", "world", "linked", "fetch"),
    [
        ("auto", TWO, False, "replicated"),
        ("auto", APART, True, "replicated"),
        ("auto", ALONE, True, "replicated"),
        ("replicated", TWO, True, "replicated"),
        ("partitioned", TWO, False, "partitioned"),
    ],
)
def test_ranks_share_one_walk_over_the_weights_only_where_they_reach_each_other_or_are_told_to(
    asked: Any, world: World, linked: bool, fetch: str, ask: Ask
) -> None:
    assert ask(offload="cpu", fetch=asked, world=world, linked=linked).fetch == fetch


@pytest.mark.parametrize(
    ("options", "world", "words"),
    [
        ({"engine": "zero", "wire": "int4"}, ALONE, "--wire has no effect with the zero engine"),
        ({"engine": "zero", "kv": "host"}, ALONE, "--kv has no effect with the zero engine"),
        ({"engine": "zero", "kv_dtype": "int8"}, ALONE, "--kv-dtype has no effect with the zero engine"),
        ({"engine": "zero", "kv_attention": "cpu"}, ALONE, "--kv-attention has no effect with the zero engine"),
        ({"kv": "gpu", "kv_attention": "cpu"}, ALONE, "--kv-attention cpu has no effect with --kv gpu"),
        ({"kv": "gpu", "kv_dtype": "int8"}, ALONE, "--kv-dtype int8 is for keys and values in host memory"),
        ({"engine": "zero", "fetch": "partitioned"}, TWO, "--fetch has no effect with the zero engine"),
        ({"engine": "zero", "resident_blocks": 0}, ALONE, "--resident-blocks has no effect with the zero engine"),
        ({"offload": "none", "fetch": "replicated"}, TWO, "--fetch has no effect with --offload none"),
        ({"batch_size": 4, "micro_batch_rows": 5}, ALONE, "--micro-batch-rows 5, but with --batch-size 4"),
        ({"fetch": "replicated"}, ALONE, "--fetch replicated has no effect with one rank"),
        ({"fetch": "partitioned"}, APART, "--fetch partitioned needs all ranks on one node"),
        ({"resident_blocks": BLOCKS, "offload": "cpu"}, ALONE, "--offload and --fetch have no effect"),
        ({"resident_blocks": BLOCKS, "fetch": "replicated"}, TWO, "--offload and --fetch have no effect"),
        ({"resident_blocks": BLOCKS + 1}, ALONE, f"--resident-blocks {BLOCKS + 1}, but the model has {BLOCKS} layers"),
    ],
)
def test_settings_of_the_stream_engine_are_refused_where_they_would_mean_nothing(
    options: dict[str, Any], world: World, words: str, ask: Ask
) -> None:
    with pytest.raises(UsageError, match=words):
        ask(world=world, **options)


@pytest.mark.parametrize("options", [{"gpu_memory": GIB}, {"pin_memory": False}])
def test_settings_of_gpus_are_refused_on_the_cpu_and_used_elsewhere(options: dict[str, Any], ask: Ask) -> None:
    with pytest.raises(UsageError, match="has no effect: this run computes on the CPU"):
        ask(device="cpu", **options)
    plan = ask(**options)
    assert plan.pin_memory == options.get("pin_memory", True)


@pytest.mark.parametrize("options", [{"resident_blocks": 1}, {"resident_blocks": 0}, {"fetch": "replicated"}])
def test_auto_offload_streams_where_something_is_said_about_streaming(options: dict[str, Any], ask: Ask) -> None:
    plan = ask(world=TWO, **options)
    assert ask(world=TWO).offload == "none"
    assert plan.offload == "cpu"
    assert options.get("resident_blocks", plan.resident_blocks) == plan.resident_blocks < BLOCKS


# Rows


@pytest.mark.parametrize(("requests", "ranks", "rows"), [(1, 1, 1), (5, 1, 5), (5, 2, 3), (2, 2, 1), (1, 2, 1)])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_auto_shares_few_requests_equally(requests: int, ranks: int, rows: int, device: str, ask: Ask) -> None:
    assert ask(world=World(size=ranks, local_size=ranks), requests=requests, device=device).batch_size == rows


def test_a_batch_that_was_asked_for_is_taken(ask: Ask) -> None:
    assert ask(batch_size=7).batch_size == 7


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_plan_counts_with_the_longest_prompt_and_the_most_new_tokens(
    batch_size: int | None, source: ModelSource, tmp_path: Path
) -> None:
    lines = [("x" * 30, 2), ("y", 9), ("z" * 12, 4)]
    requests = tmp_path / "in.jsonl"
    requests.write_text("".join(json.dumps({"prompt": p, "max_new_tokens": n}) + "\n" for p, n in lines))
    options = RunOptions(
        model=source.name, sampling=Sampling(max_new_tokens=100), input_files=(str(requests),), batch_size=batch_size
    )
    reading = read_job(options, source, "cpu")
    prepared = prepare(options, source, reading, reading.job.work, ALONE, "cpu")
    assert (prepared.plan.prompt_tokens, prepared.plan.new_tokens) == (30, 9)
    assert prepared.plan.batch_size == (batch_size or 3)
    assert sorted(len(work.prompt) for work in prepared.work) == [1, 12, 30]


def test_a_plan_for_an_input_is_that_of_its_run_and_counts_what_its_prompts_share(
    source: ModelSource, tmp_path: Path
) -> None:
    requests = tmp_path / "in.jsonl"
    prompts = ["header " * 10 + str(number) * (1 + number) for number in range(9)]
    requests.write_text("".join(json.dumps({"prompt": p, "max_tokens": 3 + len(p) % 4}) + "\n" for p in prompts))
    run = RunOptions(model=source.name, sampling=Sampling(max_new_tokens=100), input_files=(str(requests),))
    reading = read_job(run, source, "cpu")
    of_run = prepare(run, source, reading, reading.job.work, ALONE, "cpu").plan
    asked = PlanOptions(model=source.name, input_files=(str(requests),), random_weights=source.random_weights)
    found = plan_input_of(asked)
    assert (found.constraints.requests, found.lengths.prefixes) == (9, of_run.prefixes)
    assert found.lengths == replace(lengths_of(reading.anatomy, reading.job.work, groups_of(reading.job.work)),
                                    request_bytes=request_bytes(9, 1))  # fmt: skip
    assert found.lengths.prefixes is not None
    assert found.lengths.prefixes.saved_tokens * 9 == 8 * 64, "each prompt but one finds four pages"
    assert plan_input_of(replace(asked, share_prefixes=False)).lengths.prefixes is None


def test_a_plan_for_an_input_refuses_what_the_input_says_and_what_a_plan_has_no_use_for(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("x\n")
    file = ("-m", "demo", "-i", str(tmp_path / "in.txt"))
    for words, wanted in (
        ((*file, "--input-len", "9"), "--input-len has no effect with -i"),
        ((*file, "--requests", "9"), "--requests has no effect with -i"),
        ((*file, "--keep-columns", "a"), "--keep-columns has no effect on a plan"),
        (("-m", "demo", "--chat"), "--chat has no effect without -i"),
        (("--models", "all", *file[2:]), "-i has no effect with a table"),
    ):
        error = CliRunner().invoke(cli, ["plan", *words], standalone_mode=False).exception
        assert isinstance(error, UsageError)
        assert wanted in error.message


# Memory


def test_gpu_memory_is_a_limit_on_what_is_planned(ask: Ask) -> None:
    limit = total(ask(requests=4096).terms, "gpu") - 1
    assert total(ask(requests=4096, gpu_memory=limit).terms, "gpu") <= limit


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_host_memory_is_a_limit_that_is_refused_with_what_would_do(device: str, ask: Ask) -> None:
    with pytest.raises(DoesNotFitError, match=r"0\.50 GiB are there") as caught:
        ask(device=device, host_memory=GIB // 2)
    assert "GiB more host memory: " in (caught.value.hint or "")


def test_host_memory_beyond_what_there_is_adds_none(ask: Ask) -> None:
    with pytest.raises(DoesNotFitError, match=r"1\.00 GiB are there"):
        ask(on=machine_of(gpu_of(), host_bytes=GIB), offload="cpu", host_memory=1000 * GIB)


def test_masks_of_structured_answers_are_a_term_of_host_memory(ask: Ask, anatomy: Anatomy) -> None:
    def masks(device: str, lengths: Lengths) -> list[int]:
        terms = ask(batch_size=3, device=device, lengths=lengths).terms
        return [term.nbytes for term in terms if (term.name, term.place) == (MASKS, "host")]

    structured = replace(LENGTHS, structured=True)
    vocabulary = Vocabulary.__new__(Vocabulary)
    vocabulary.words = -(-anatomy.vocabulary // WORD_BITS)
    (held,) = masks("cpu", structured)
    assert held == Masks(3, torch.device("cpu"))._memory(vocabulary).nbytes
    (locked,) = masks("cuda", structured)
    assert held <= locked < 2 * held
    assert locked.bit_count() == 1, "torch locks powers of two"
    assert masks("cuda", LENGTHS) == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_host_too_small_for_the_weights_leaves_blocks_on_the_disk(
    device: str, ask: Ask, anatomy: Anatomy, tmp_path: Path
) -> None:
    def asked(host_bytes: int) -> Plan:
        here = machine_of(gpu_of(), host_bytes=host_bytes)
        return ask(on=here, device=device, nvme_paths=(tmp_path,), resident_blocks=0, batch_size=1)

    plenty = asked(64 * GIB)
    assert (plenty.offload, plenty.nvme_blocks) == ("cpu", 0)
    found = {plan.nvme_blocks for plan in _shrinking(asked, total(plenty.terms, "host"), anatomy)}
    assert found >= {0, BLOCKS // 2, BLOCKS}


def test_a_store_that_is_there_needs_no_more_room(
    ask: Ask, source: ModelSource, anatomy: Anatomy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = replace(folder_on_disk(tmp_path), free_bytes=0)
    monkeypatch.setattr(sys.modules[__name__], "folder_on_disk", lambda path: full)
    asked = {"nvme_paths": (tmp_path,), "resident_blocks": 0, "batch_size": 1}
    needed = total(ask(**asked).terms, "host")
    small = machine_of(gpu_of(), host_bytes=needed - (BLOCKS - 2) * max(pieces(anatomy)))
    with pytest.raises(DoesNotFitError, match="on the disk"):
        ask(on=small, **asked)
    name = f"{source_key(weights_identity(source), 'float32', 'model', 1)}-layout"
    data_file(store_folder(tmp_path, name)).parent.mkdir(parents=True)
    data_file(store_folder(tmp_path, name)).write_bytes(b"0" * store_bytes(anatomy))
    header_file(store_folder(tmp_path, name)).touch()
    assert ask(on=small, **asked).offload == "nvme"


def _shrinking(asked: Callable[[int], Plan], host_bytes: int, anatomy: Anatomy) -> list[Plan]:
    """Plans with ever less host memory than `host_bytes`, a block at a time, until nothing fits."""
    step, plans = max(pieces(anatomy)), []
    for turn in range(BLOCKS + 1):
        try:
            plans.append(asked(host_bytes - turn * step))
        except DoesNotFitError:
            break
        assert total(plans[-1].terms, "host") <= host_bytes - turn * step
    return plans


# A JSON of the user's own


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_the_users_own_json_says_where_weights_rest(device: str, ask: Ask, tmp_path: Path) -> None:
    own = tmp_path / "zero.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": device}}}))
    plan = ask(zero_config=own, gpu_memory=8 * GIB)
    assert (plan.engine, plan.offload) == ("zero", device)
    assert total(plan.terms, "gpu") <= 8 * GIB


def test_the_users_own_json_is_refused_where_it_does_not_fit(ask: Ask, tmp_path: Path) -> None:
    own = tmp_path / "zero.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(DoesNotFitError, match="of GPU memory"):
        ask(zero_config=own, gpu_memory=GIB // 2)


# Keys and values


def test_keys_and_values_rest_where_the_user_says(ask: Ask) -> None:
    plan = ask(kv="host", kv_dtype="int8", batch_size=3)
    assert plan.host is not None
    assert (plan.host_rows, plan.pool_pages, plan.host.dtype) == (3, 0, "int8")
    assert ask(kv="gpu", batch_size=3).host is None


@pytest.mark.parametrize("kv", ["host", "auto"])
def test_a_model_that_keeps_no_keys_and_values_has_none_in_host_memory(kv: Any) -> None:
    mamba = read_anatomy(small_config("mamba"))
    with pytest.raises(UsageError, match="no layer of MambaForCausalLM keeps keys and values"):
        host_share(kv, "int8", "stream", mamba)
    assert host_share("auto", "model", "stream", mamba) == 0.0


def test_the_cpu_attends_where_the_user_says(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--kv-attention cpu needs packed forwards: Triton"):
        ask(kv="host", kv_attention="cpu", batch_size=3)
    monkeypatch.setattr("zeroinf.options.planning.why_no_kernels", lambda: "")
    assert ask(kv="host", kv_attention="cpu", batch_size=3).kv_attention == "cpu"
    assert ask(kv="host", batch_size=3).kv_attention == "gpu"
    bloom = read_anatomy(small_config("bloom"))
    with pytest.raises(UsageError, match="--kv-attention cpu needs packed forwards: its forward takes no positions"):
        check_kv_attention("cpu", "host", "stream", bloom)


def test_a_plan_loads_a_checkpoint_as_its_run_does(tmp_path: Path) -> None:
    config = small_config("llama")
    config.save_pretrained(tmp_path)

    def loads(**more: Any) -> str:
        return plan_input_of(
            PlanOptions(model=str(tmp_path), host_memory=8 * GIB, input_len=8, output_len=4, **more)
        ).anatomy.loads

    assert loads() == "in place", "there are no weights yet"
    torch.save(AutoModelForCausalLM.from_config(config).state_dict(), tmp_path / "pytorch_model.bin")
    assert loads() == "as a whole"
    assert loads(random_weights=True) == "in place"


def test_a_plan_has_the_room_that_a_store_of_its_run_takes_already(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zeroinf.options.plan_input.room_taken", lambda paths, found, dtype, wire: 3 * GIB)
    space = PlanOptions(model=source.location, host_memory=8 * GIB, nvme_paths=(tmp_path,), input_len=8, output_len=4)
    free = shutil.disk_usage(tmp_path).free
    assert plan_input_of(space).constraints.nvme_space_bytes == pytest.approx(free + 3 * GIB, rel=0.05)
