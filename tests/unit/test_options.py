"""Options: what is defined of them once holds wherever they are used, and is refused alike by runs and plans."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from zeroinf.engines.registry import ENGINE_NAMES, ENGINES, descriptor_of
from zeroinf.errors import UsageError
from zeroinf.generation.row import Sampling
from zeroinf.options.contradictions import refuse_idle
from zeroinf.options.definition import Definition, definitions, fingerprint_of, from_keywords, from_parameters
from zeroinf.options.options import JobOptions, PlanOptions, RunOptions
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.plan import AioSettings, TensorParallel

RUN = {one.name: one for one in definitions(RunOptions)}
OF_ENGINES = {
    one.path[0] for options in (RunOptions, PlanOptions) for one in definitions(options) if one.option.engine_specific
}
ASKED: dict[str, Any] = {
    "fetch": "replicated",
    "wire": "int8",
    "kv": "host",
    "kv_dtype": "int8",
    "kv_attention": "cpu",
    "embeddings": "cpu",
    "expert_parts": 2,
    "routed_tokens": 1,
    "resident_blocks": 1,
    "pin_memory": False,
    "aio": AioSettings(threads=2),
    "tensor_parallel": TensorParallel(size=2),
    "tensor_parallel_size": 2,
    "static_batches": True,
    "share_prefixes": False,
    "zero_config": Path("zero.json"),
}


def run_of(**asked: Any) -> RunOptions:
    return RunOptions(**{"model": "m", "sampling": Sampling(max_new_tokens=1), **asked})


def test_engines_take_options_by_names_that_there_are_and_each_is_taken_by_one() -> None:
    assert ASKED.keys() == OF_ENGINES
    assert {name for engine in ENGINES for name in engine.options} == OF_ENGINES


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("name", sorted(OF_ENGINES - {"zero_config"}))
def test_runs_and_plans_refuse_options_of_other_engines_with_the_same_words(name: str, engine: str) -> None:
    words = set()
    for made in (run_of, lambda **asked: PlanOptions(model="m", **asked)):
        if name in {field.name for field in fields(made())} and name not in descriptor_of(engine).options:
            with pytest.raises(UsageError) as caught:
                refuse_idle(made(engine=engine, **{name: ASKED[name]}))
            words.add((caught.value.message, caught.value.hint))
    assert len(words) == (name not in descriptor_of(engine).options)
    assert all(f"has no effect with the {engine} engine" in message for message, _ in words)


def test_what_the_planner_is_told_has_the_type_and_the_default_of_the_option() -> None:
    hints, known = get_type_hints(Constraints), get_type_hints(RunOptions)
    shared = {one.name: one for one in fields(Constraints) if one.name in known and one.name not in ("engine",)}
    assert {"resident_blocks", "offload", "fetch", "wire", "batch_size", "kv_dtype"} <= shared.keys()
    for name, field in shared.items():
        assert (hints[name], field.default) == (known[name], RUN[name].default), name


def test_the_default_in_so_many_words_is_asked_only_where_it_asks_for_something() -> None:
    given = {"pin_memory": True, "fetch": "auto", "resident_blocks": None, "aio_threads": 8}
    options = from_parameters(RunOptions, given, frozenset(given), model="m", sampling=Sampling(max_new_tokens=1))
    assert options.asked("pin_memory", "fetch", "resident_blocks", "aio") == ["--pin-memory", "--aio-threads"]
    assert not run_of(pin_memory=True).is_asked("pin_memory")


def test_parameters_make_their_parts_and_what_no_option_has_is_no_parameter() -> None:
    options = from_parameters(JobOptions, {"keep_columns": "a, b", "chat_template_kwargs": {"x": 1}, "samples": 2})
    assert (options.shape.keep, options.shape.samples) == (("a", "b"), 2)
    with pytest.raises(UsageError, match=r"^--chat-template-kwargs: "):
        from_parameters(JobOptions, {"chat_template_kwargs": {"add_generation_prompt": False}})
    with pytest.raises(TypeError, match="has no option offload"):
        from_parameters(JobOptions, {"offload": "cpu"})


def test_keywords_may_be_text_where_sizes_and_paths_are_meant() -> None:
    options = from_keywords(
        RunOptions,
        {"model": "m", "gpu_memory": "2GiB", "nvme_paths": ["a"], "zero_config": "z.json", "aio": None, "x": 1},
        sampling=Sampling(max_new_tokens=1),
    )
    assert (options.gpu_memory, options.nvme_paths, options.zero_config) == (2 << 30, (Path("a"),), Path("z.json"))
    assert options.aio == AioSettings()


def test_no_two_options_of_a_run_share_a_flag_or_a_name_in_the_fingerprint() -> None:
    written = [flag for one in RUN.values() for flag in one.flags]
    assert len(set(written)) == len(written)
    marked = [one.option.fingerprint for one in RUN.values() if one.option.fingerprint]
    assert len(set(marked)) == len(marked) == len(fingerprint_of(run_of()))


@pytest.mark.parametrize("one", RUN.values(), ids=lambda one: one.name)
def test_every_option_is_documented(one: Definition) -> None:
    assert one.option.help.endswith((".", "]"))
    assert one.flag.startswith("--")
