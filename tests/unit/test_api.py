"""`import zeroinf`: what it offers, and that it is called as transformers' text-generation pipeline is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import transformers

import zeroinf
from zeroinf.errors import InputError, ModelError, UsageError
from zeroinf.jobs.ask import PlanOptions

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
        "Generated",
        "Pipeline",
        "Plan",
        "Result",
        "TensorParallel",
        "__version__",
        "generate",
        "pipeline",
        "plan",
    ]
    assert all(getattr(zeroinf, name) is not None for name in zeroinf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zeroinf.nothing


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
        ({"num_beams": 4}, "unknown argument 'num_beams'"),
        ({"do_sample": False, "temperature": 1.0}, "temperature has no effect"),
        ({"top_k": 5}, "top_k would change nothing"),
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


def test_a_plan_is_made_for_a_machine_that_is_not_here() -> None:
    plan = zeroinf.plan("llama-2-7b", machine="1xRTX4090-24GB-64GiB", batch_size=2, gpu_memory="8GiB", input_len=64)
    assert plan.batch_size == 2
    assert sum(term.nbytes for term in plan.terms if term.place == "gpu") <= 8 << 30
    assert plan.timing is not None


def test_a_plan_can_be_told_all_that_the_command_line_can_but_deepspeeds_own_settings() -> None:
    options = {field.name for field in fields(PlanOptions)} - {"aio", "pin_memory", "machine_name"}
    assert inspect.signature(zeroinf.plan).parameters.keys() == options | {"machine"}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"engine": "zero", "wire": "int8"}, "--wire has no effect with the zero engine"),
        ({"engine": "resident", "fetch": "replicated"}, "--fetch has no effect with the resident engine"),
        ({"engine": "zero", "kv": "host"}, "--kv has no effect with the zero engine"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size has no effect with the stream engine"),
        ({"offload": "none", "resident_blocks": 1}, "--resident-blocks has no effect with --offload none"),
        ({"offload": "cpu", "nvme_paths": ["."]}, "--nvme-path has no effect with --offload cpu"),
        ({"engine": "resident", "nvme_paths": ["."]}, "--nvme-path has no effect with --offload none"),
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
        (lambda: zeroinf.pipeline("x", engin="zero"), UsageError),
    ],
)
def test_mistakes_raise_the_errors_of_the_command_line(call: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        call()
