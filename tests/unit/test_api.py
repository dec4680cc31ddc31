"""`import zeroinf`: what it offers, and that it is called as transformers' text-generation pipeline is."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any, get_type_hints

import psutil
import pytest
import torch
import transformers
from ranks import on_ranks
from rich.console import Console
from rich.status import Status

import zeroinf
from zeroinf.api import Engine, Size
from zeroinf.distributed.control import Control
from zeroinf.errors import InputError, ModelError, RankError, UsageError
from zeroinf.options.definition import Options, definitions
from zeroinf.options.options import LoadOptions, PlanOptions
from zeroinf.planner.plan import AioSettings, TensorParallel
from zeroinf.runs.progress import ProgressObserver
from zeroinf.service.observer import Progress

NEW_TOKENS = 6
PROMPTS = ["One", "A prompt of some length", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from small_models import make_checkpoint

    return str(make_checkpoint("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def theirs(model: str) -> Any:
    return transformers.pipeline("text-generation", model, dtype="float32", device="cpu")


@pytest.fixture(scope="module", params=["stream", "resident", "accelerate"])
def ours(request: pytest.FixtureRequest, model: str) -> Iterator[zeroinf.Pipeline]:
    with zeroinf.pipeline(model, engine=request.param, batch_size=2, max_prompt_tokens=32, max_new_tokens=16) as pipe:
        yield pipe


def test_what_the_package_offers_is_frozen() -> None:
    assert zeroinf.__all__ == [
        "AioSettings",
        "Completion",
        "Generated",
        "Handle",
        "Pipeline",
        "Plan",
        "Result",
        "TensorParallel",
        "TokenEvent",
        "__version__",
        "client",
        "deploy",
        "generate",
        "pipeline",
        "plan",
        "terminate",
    ]
    assert all(getattr(zeroinf, name) is not None for name in zeroinf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zeroinf.nothing


def test_a_call_tells_how_far_it_is_by_tokens(ours: zeroinf.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Progress] = []
    monkeypatch.setattr(ProgressObserver, "progress", lambda self, progress: told.append(progress))
    results = ours.generate([*PROMPTS, {"prompt": "longer", "max_new_tokens": 16}], max_new_tokens=NEW_TOKENS)
    generated = sum(result.completion_tokens for result in results)
    assert [one.rows_done for one in told if one.rows_done] == [1, 2, 3, 4]
    assert (told[-1].rows, told[-1].tokens, told[-1].tokens_left, told[-1].left_s) == (4, generated, 0, 0)
    assert told[0].tokens_left > 0


def test_a_calls_bar_shows_tokens_a_second_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    observer = ProgressObserver(True)
    for number in observer.counted(range(2), 2):
        observer.progress(
            Progress(rows_done=number + 1, rows=2, tokens=10, tokens_left=30, elapsed_s=2.0, streamed_bytes=0)
        )
    assert "2/2 5.0 tokens/s, 0:06 left" in capsys.readouterr().err


HOW_TO_RUN = (
    *("engine", "offload", "nvme_paths", "fetch", "batch_size", "micro_batch_rows", "share_prefixes", "wire"),
    *(
        "kv",
        "kv_dtype",
        "kv_attention",
        "embeddings",
        "expert_parts",
        "routed_tokens",
        "resident_blocks",
        "tensor_parallel",
        "num_gpus",
        "gpu_memory",
        "host_memory",
        "pin_memory",
        "aio",
    ),
    *("zero_config", "dtype", "revision", "trust_remote_code", "random_weights", "progress"),
)
ONE = (
    *("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens", "stop_token_ids"),
    *("response_format", "json_schema", "regex", "choices"),
)
SAMPLING = (*ONE, "n")


def test_steps_before_loading_are_shown_and_gone_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = list[str]()

    class Shown(Status):
        def start(self) -> None:
            told.append(str(self.status))

        def update(self, status: Any = None, **how: Any) -> None:
            told.append(str(status))

        def stop(self) -> None:
            told.append("gone")

    monkeypatch.setattr(Console, "status", lambda console, step: Shown(step, console=console))
    with pytest.raises(ModelError):
        zeroinf.pipeline(str(tmp_path), progress=True)
    assert told == ["reading the model", "gone"]
    observer = ProgressObserver(True)
    observer.doing("reading the model")
    observer.doing("planning")
    observer.ended()
    assert told[2:] == ["reading the model", "planning", "gone"]
    ProgressObserver(False).doing("planning")
    assert len(told) == 5


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (zeroinf.generate, ("model", "prompts", *SAMPLING, "echo", "logprobs", *HOW_TO_RUN)),
        (zeroinf.pipeline, ("model", "max_prompt_tokens", "max_new_tokens", "logprobs", *HOW_TO_RUN)),
        (zeroinf.Pipeline.__call__, ("self", "text_inputs", "return_full_text", *SAMPLING)),
        (zeroinf.Pipeline.generate, ("self", "prompts", *SAMPLING, "echo", "logprobs")),
        (zeroinf.Pipeline.as_finished, ("self", "prompts", *SAMPLING, "echo", "logprobs")),
        (zeroinf.Pipeline.submit, ("self", "prompt", "priority", *ONE, "logprobs")),
        (zeroinf.Handle.result, ("self", "timeout_s")),
        (zeroinf.Handle.cancel, ("self",)),
    ],
)
def test_signatures_are_frozen_and_typed(function: Any, names: tuple[str, ...]) -> None:
    parameters = inspect.signature(function).parameters
    assert tuple(parameters) == names
    own = [parameter for name, parameter in parameters.items() if name != "self"]
    assert all(each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD) for each in own)
    assert all(each.annotation is not each.empty for each in own)


@pytest.mark.parametrize(
    ("function", "options", "left_out", "own"),
    [
        (zeroinf.generate, LoadOptions, set(), {"prompts", "echo", "logprobs", "num_gpus", "progress", *SAMPLING}),
        (
            zeroinf.pipeline,
            LoadOptions,
            set(),
            {"max_prompt_tokens", "max_new_tokens", "logprobs", "num_gpus", "progress"},
        ),
        (
            zeroinf.plan,
            PlanOptions,
            {"aio", "pin_memory", "input_files", "input_format", "shape", "max_model_len"},
            set(),
        ),
    ],
)
def test_keywords_are_the_options_of_the_command_line_with_their_types_and_defaults(
    function: Any, options: type[Options], left_out: set[str], own: set[str]
) -> None:
    keywords, hints, known = inspect.signature(function).parameters, get_type_hints(function), get_type_hints(options)
    named = {field.name: field for field in fields(options) if field.metadata}
    assert keywords.keys() - own == named.keys() - left_out
    sizes = {one.path[0] for one in definitions(options) if one.option.is_size}
    wider = {
        **dict.fromkeys(sizes, Size | None),
        "engine": Engine,
        "nvme_paths": Iterable[str | Path],
        "zero_config": str | Path | None,
        "tensor_parallel": TensorParallel | None,
        "aio": AioSettings | None,
    }
    for name in named.keys() - left_out:
        assert hints[name] == wider.get(name, known[name]), name
        default = keywords[name].default
        if name in ("tensor_parallel", "aio"):
            assert default is None
        elif name != "model":
            assert default == named[name].default, name


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"offload": "disk"}, "offload='disk': no such choice"),
        ({"engine": "fast"}, "engine='fast': no such choice"),
        ({"batch_size": 0}, "batch_size=0: at least 1"),
        ({"link_gbps": 0.0}, "link_gbps=0.0: above 0"),
        ({"gpu_memory": "much"}, "gpu_memory: "),
    ],
)
def test_values_that_the_command_line_refuses_are_refused_by_their_keywords(how: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        zeroinf.plan("pythia-70m", **how)


def test_settings_of_requests_are_keywords(model: str) -> None:
    with zeroinf.pipeline(model, batch_size=2, max_prompt_tokens=32, max_new_tokens=16) as pipe:
        (free,) = pipe.generate(["One"], max_new_tokens=4, ignore_eos=True)
        assert free.finish_reason == "length"
        tokens = list(pipe.submit("One", max_new_tokens=4, ignore_eos=True).result().tokens)
        ended = pipe.submit("One", max_new_tokens=4, stop_token_ids=[tokens[1]], ignore_eos=True).result()
        assert (ended.finish_reason, list(ended.tokens)) == ("stop", tokens[: tokens.index(tokens[1]) + 1])
        longer = pipe.submit(
            "One", max_new_tokens=4, stop_token_ids=[tokens[0]], min_tokens=2, ignore_eos=True
        ).result()
        assert len(longer.tokens) >= 2
        forced = pipe.submit("One", max_new_tokens=3, logit_bias={7: 100.0}, ignore_eos=True).result()
        assert set(forced.tokens) == {7}
        moved = pipe.submit("One", max_new_tokens=3, logit_bias={7: 50.0, 8: 49.0}, presence_penalty=2.0).result()
        assert set(moved.tokens[:2]) == {7, 8}
        several = pipe.generate(["One", {"prompt": "Two", "n": 1}], n=3, do_sample=True, seed=1, echo=True)
        assert [result.id for result in several] == ["0", "0", "0", "1"]
        assert [result.extra and result.extra.choice for result in several[:3]] == [0, 1, 2]
        assert all(result.text == f"One{result.completion}" for result in several[:3])
        assert len({result.completion for result in several[:3]}) > 1
        assert [len(found) for found in pipe(["One", "Two"], n=2, do_sample=True)] == [2, 2]
        with pytest.raises(UsageError, match="presence_penalty must lie between"):
            pipe("One", presence_penalty=3.0)
        with pytest.raises(InputError, match="n and echo are for calls"):
            pipe.submit({"prompt": "One", "n": 2, "temperature": 1.0})


@pytest.mark.parametrize("full", [True, False, None])
@pytest.mark.parametrize("prompts", [PROMPTS[1], [PROMPTS[1]], PROMPTS], ids=["text", "list of one", "list"])
def test_a_pipeline_returns_what_transformers_pipeline_returns(
    prompts: str | list[str], full: bool | None, ours: zeroinf.Pipeline, theirs: Any
) -> None:
    how: dict[str, Any] = {} if full is None else {"return_full_text": full}
    wanted = theirs(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, **how)
    assert ours(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, **how) == wanted


def test_a_chat_comes_back_with_the_answer_at_its_end(ours: zeroinf.Pipeline) -> None:
    ours.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = [{"role": "user", "content": "hi"}]
    (found,) = ours(chat, max_new_tokens=NEW_TOKENS)
    (several,) = ours([chat], max_new_tokens=NEW_TOKENS)
    assert found["generated_text"][:1] == chat
    assert found["generated_text"][1]["role"] == "assistant"  # type: ignore[index]
    assert several == [found]


def test_a_stop_string_ends_the_text_where_transformers_does(ours: zeroinf.Pipeline, theirs: Any) -> None:
    ids = theirs.tokenizer(PROMPTS[1], return_tensors="pt")
    full = theirs.model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    stop = theirs.tokenizer.decode(full[3:5])
    tokens = theirs.model.generate(
        **ids, max_new_tokens=8, do_sample=False, stop_strings=stop, tokenizer=theirs.tokenizer
    )[0, ids["input_ids"].shape[1] :]
    (found,) = ours(PROMPTS[1], max_new_tokens=8, stop=stop, return_full_text=False)
    text = theirs.tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(tokens) < 8 and text == found["generated_text"] + stop


def test_sampling_repeats_with_its_seed(ours: zeroinf.Pipeline) -> None:
    def drawn(seed: int) -> Any:
        return ours(PROMPTS, max_new_tokens=16, do_sample=True, temperature=5.0, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"do_sample": False, "temperature": 1.0}, "temperature has no effect"),
        ({"top_k": 5}, "top_k has no effect"),
        ({"top_p": 2.0, "do_sample": True}, "top_p must lie above 0"),
    ],
)
def test_arguments_without_effect_are_refused_by_name(how: dict[str, Any], words: str, ours: zeroinf.Pipeline) -> None:
    with pytest.raises(UsageError, match=words):
        ours("x", **how)


def test_what_is_longer_than_planned_is_refused_before_it_runs(ours: zeroinf.Pipeline) -> None:
    with pytest.raises(InputError, match="a prompt of 40 tokens, but the plan was made for up to 32"):
        ours("x" * 40)
    with pytest.raises(InputError, match="a completion of 17 tokens"):
        ours("x", max_new_tokens=17)


def test_generate_completes_prompts_in_order(model: str, theirs: Any) -> None:
    found = zeroinf.generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, batch_size=2)
    wanted = theirs(PROMPTS, max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False)
    assert [result.completion for result in found] == [one[0]["generated_text"] for one in wanted]
    assert [result.prompt for result in found] == PROMPTS
    assert zeroinf.generate(model, []) == []


def test_prompts_have_settings_of_their_own(model: str) -> None:
    prompts: list[Any] = [
        "one",
        {"prompt": "two", "max_new_tokens": 3, "logprobs": 2},
        {"prompt": "one", "temperature": 4.0, "seed": 1},
    ]
    first, second, third = zeroinf.generate(model, prompts, max_new_tokens=NEW_TOKENS, batch_size=2, ignore_eos=True)
    assert (first.finish_reason, first.prompt_tokens, first.completion_tokens) == ("length", 3, NEW_TOKENS)
    assert first.logprobs is None
    assert (second.completion_tokens, len(second.logprobs or [])) == (3, 3)
    assert third.completion != first.completion
    with pytest.raises(InputError, match="prompt 1: unknown key 'max_lenght'"):
        zeroinf.generate(model, ["x", {"prompt": "y", "max_lenght": 3}])


@pytest.mark.parametrize(
    "how", [{"kv": "host"}, {"kv": "host", "kv_dtype": "int8"}, {"kv": "host", "kv_attention": "cpu"}]
)
def test_keys_and_values_may_rest_in_host_memory(how: dict[str, Any], model: str) -> None:
    wanted = zeroinf.generate(model, PROMPTS, max_new_tokens=NEW_TOKENS)
    found = zeroinf.generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, **how)
    if "kv_dtype" not in how:
        assert found == wanted
    assert [result.finish_reason for result in found] == [result.finish_reason for result in wanted]


def test_a_model_with_an_encoder_completes_prompts(small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint("t5")
    found = zeroinf.generate(str(folder), PROMPTS, max_new_tokens=NEW_TOKENS, dtype="float32", offload="cpu")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt, result in zip(PROMPTS, found, strict=True):
        given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        (tokens,) = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
        assert result.completion == tokenizer.decode(tokens, skip_special_tokens=True)


def test_results_come_as_they_finish_and_what_nobody_reads_is_cancelled(ours: zeroinf.Pipeline) -> None:
    prompts = [{"prompt": "x", "max_new_tokens": length} for length in (16, 1, 1, 1)]
    found = [result.index for result in ours.as_finished(prompts, ignore_eos=True)]
    assert sorted(found) == [0, 1, 2, 3]
    assert found[0] != 0
    assert next(ours.as_finished(prompts * 9, ignore_eos=True)).completion_tokens in (1, 16)
    assert ours("x", max_new_tokens=1)


def test_requests_stream_beside_calls_for_threads_and_asyncio(ours: zeroinf.Pipeline) -> None:
    (wanted,) = ours.generate(["A prompt"], max_new_tokens=NEW_TOKENS)

    async def several() -> list[str]:
        asked = [ours.submit("A prompt", max_new_tokens=NEW_TOKENS) for _ in range(3)]
        streamed = "".join([event.text async for event in asked[0]])
        return [streamed, *(completion.text for completion in await asyncio.gather(*asked))]

    texts = [event.text for event in ours.submit("A prompt", max_new_tokens=NEW_TOKENS)]
    assert "".join(texts) == wanted.completion
    assert len(texts) > 1
    assert asyncio.run(several()) == [wanted.completion] * 4
    ended = ours.submit("A prompt", max_new_tokens=16, ignore_eos=True)
    ended.cancel()
    assert ended.result(60).finish_reason in ("cancelled", "length")


def in_a_process(body: Callable[[], None]) -> None:
    """Run `body` in a process of its own, with nothing of a launcher in its environment."""

    def alone(control: Control) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        body()

    found, codes = on_ranks(1, alone, seconds=120)
    assert (found, codes) == ([None], [0])


def run_on_two_engines(model: str) -> None:
    for engine in ("zero", "stream"):
        with zeroinf.pipeline(model, engine=engine, max_prompt_tokens=8, max_new_tokens=2) as pipe:  # type: ignore[arg-type]
            assert pipe("x", max_new_tokens=2)


def test_nothing_of_a_pipeline_is_left_behind(model: str) -> None:
    def body() -> None:
        before, threads = dict(os.environ), threading.active_count()
        run_on_two_engines(model)
        assert dict(os.environ) == before
        assert threading.active_count() == threads
        assert not torch.distributed.is_initialized()
        assert not transformers.integrations.is_deepspeed_zero3_enabled()

    in_a_process(body)


def test_the_callers_own_process_group_stays(model: str, tmp_path: Path) -> None:
    def body() -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
        run_on_two_engines(model)
        assert torch.distributed.is_initialized()
        torch.distributed.barrier()

    in_a_process(body)


def other_ranks() -> list[psutil.Process]:
    """Processes of this one that are ranks."""
    return [each for each in psutil.Process().children() if "zeroinf.runs.ranks" in each.cmdline()]


def test_a_pipeline_reports_what_it_has_done_and_nothing_else(model: str) -> None:
    with zeroinf.pipeline(model, max_prompt_tokens=16, max_new_tokens=16) as pipe:
        assert pipe.report().requests == pipe.report().completion_tokens == 0
        results = pipe.generate(["one", "two and more"], max_new_tokens=NEW_TOKENS, ignore_eos=True)
        first = second = pipe.report()
        while second.generate_s - first.generate_s >= (second.start_to_finish_s - first.start_to_finish_s) / 2:
            first = pipe.report()  # until its last pass has ended
            time.sleep(0.3)  # nothing is done meanwhile
            second = pipe.report()
    assert first.requests == first.cut == 2
    assert first.prompt_tokens == sum(result.prompt_tokens for result in results)
    assert first.completion_tokens == 2 * NEW_TOKENS
    (rank,), (later,) = first.ranks, second.ranks
    assert rank.passes == rank.counts.passes == later.passes >= NEW_TOKENS
    assert 0 < rank.repetitions[0].first_token_s <= first.generate_s
    assert {"load", "speed"} <= {one.name for one in first.compared()}
    assert first.to_json()["requests"] == 2
    with pytest.raises(UsageError, match="the model is closed"):
        pipe.report()


def test_several_ranks_share_the_work_and_end_with_the_session(model: str) -> None:
    before = dict(os.environ)
    prompts = [f"prompt {number}" for number in range(12)]
    alone = zeroinf.generate(model, prompts, max_new_tokens=NEW_TOKENS)
    with zeroinf.pipeline(model, num_gpus=2, batch_size=2, max_prompt_tokens=16, max_new_tokens=16) as pipe:
        others = other_ranks()
        assert pipe.plan.world_size == 2
        assert [result.completion for result in pipe.generate(prompts, max_new_tokens=NEW_TOKENS)] == [
            result.completion for result in alone
        ]
        assert pipe.submit("x", max_new_tokens=2).result(60).text
        report = pipe.report()
        assert len(report.ranks) == 2
        assert report.requests == 13
        assert report.completion_tokens == sum(result.completion_tokens for result in alone) + 2
        assert all(rank.passes > 0 for rank in report.ranks)
    assert not psutil.wait_procs(others, timeout=0)[1]
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()
    with pytest.raises(UsageError, match="num_gpus must be at least 1"):
        zeroinf.generate(model, ["x"], num_gpus=0)


def test_a_rank_that_is_killed_ends_the_session_with_an_error(model: str) -> None:
    with zeroinf.pipeline(model, num_gpus=2, batch_size=1, max_prompt_tokens=16, max_new_tokens=200) as pipe:
        (other,) = other_ranks()
        other.kill()
        with pytest.raises(RankError, match=r"rank 1 \(process \d+\) died"):
            pipe.generate(["x"] * 50, max_new_tokens=200, ignore_eos=True)


def test_a_plan_is_made_for_a_machine_that_is_not_here() -> None:
    plan = zeroinf.plan("llama-2-7b", machine="1xRTX4090-24GB-64GiB", batch_size=2, gpu_memory="8GiB", input_len=64)
    assert plan.batch_size == 2
    assert sum(term.nbytes for term in plan.terms if term.place == "gpu") <= 8 << 30
    assert plan.timing is not None


def test_a_plan_prints_in_a_few_lines_and_in_notebooks_with_its_terms() -> None:
    plan = zeroinf.plan("llama-2-7b", machine="1xRTX4090-24GB-64GiB", batch_size=2, input_len=64)
    lines = repr(plan).splitlines()
    assert 2 <= len(lines) <= 5
    assert lines[0].startswith("stream engine, offload ")
    html = plan._repr_html_()
    assert html.count("<tr>") == len(plan.terms) + 1
    assert all(escape(term.name) in html for term in plan.terms)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"engine": "zero", "wire": "int8"}, "--wire has no effect with the zero engine"),
        ({"engine": "resident", "fetch": "replicated"}, "--fetch has no effect with the resident engine"),
        ({"engine": "zero", "kv": "host"}, "--kv has no effect with the zero engine"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size has no effect with the stream engine"),
        ({"offload": "none", "resident_blocks": 1}, "--resident-blocks has no effect with --offload none"),
        ({"offload": "cpu", "nvme_paths": ["."]}, "--nvme-path has no effect with --offload cpu"),
        ({"engine": "resident", "nvme_paths": ["."]}, "--nvme-path has no effect with the resident engine"),
    ],
)
def test_a_plan_refuses_what_would_have_no_effect_by_name(how: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        zeroinf.plan("pythia-70m", **how)


def test_a_pipeline_refuses_folders_where_nothing_would_rest(model: str) -> None:
    with pytest.raises(UsageError, match="--nvme-path has no effect with --offload cpu"):
        zeroinf.pipeline(model, offload="cpu", nvme_paths=["."])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: zeroinf.plan("pythia-70m", gpu_memory="much"), UsageError),
        (lambda: zeroinf.pipeline("./nowhere"), ModelError),
    ],
)
def test_mistakes_raise_the_errors_of_the_command_line(call: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        call()


ROOT = Path(__file__).parents[2]
EXAMPLES = [
    (page, number, code)
    for page in ("README.md", "docs/guide/python.md")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "number", "code"), EXAMPLES, ids=[f"{page}-{number}" for page, number, _ in EXAMPLES])
def test_examples_run_as_they_are_but_for_the_model(page: str, number: int, code: str, model: str) -> None:
    small = re.sub(r'"\w+/[\w.-]+"', repr(model), code).replace("llama-2-70b", "pythia-70m")
    exec(compile(small, f"{page}, example {number}", "exec"), {})


def test_pages_have_examples() -> None:
    assert len(EXAMPLES) >= 5
