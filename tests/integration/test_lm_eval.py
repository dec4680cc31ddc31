"""lm-evaluation-harness over zeroinf: the figures of its own `hf` models, from fewer passes, on one rank and on two."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from wire_reference import save_through_codes

from zeroinf.cli.lm_eval import with_model
from zeroinf.errors import UsageError
from zeroinf.lm_eval import ZeroinfLM
from zeroinf.model.demo import demo_file
from zeroinf.model.gguf.convert import convert_gguf

COUNTRIES = ("France", "Germany", "Italy", "Spain", "Poland", "Greece")
CHOICES = (" Paris", " Berlin", " Rome and its seven hills", " Madrid")
TASKS = ("local_choice", "local_text", "local_answer")


def requests(kind: Any, *asked: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("task", i, 1))
        for i, one in enumerate(asked)
    ]


def words(draw: random.Random, letters: int) -> str:
    return "".join(draw.choice("abcdefg hijkl mnop.") for _ in range(letters))


def questions(seed: int = 0) -> list[tuple[str, str]]:
    """Contexts with four one-token continuations, with longer ones, with none before them, and too long ones."""
    draw = random.Random(seed)
    asked = [(f"{words(draw, draw.randint(1, 60))}?", letter) for _ in range(12) for letter in "ABCD"]
    asked = [(context, letter) for context, _ in asked[::4] for letter in "ABCD"]
    asked += [(words(draw, 20) + " ", words(draw, draw.randint(1, 9))) for _ in range(6)]
    asked += [("", "alone"), (words(draw, 400), "the end")]
    draw.shuffle(asked)
    return asked


def assert_like(own: ZeroinfLM, theirs: HFLM, seed: int = 0) -> None:
    """Everything that the harness can ask, asked of both."""
    asked = questions(seed)
    wanted = theirs.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    found = own.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    assert [log for log, _ in found] == pytest.approx([log for log, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    texts = [(words(random.Random(seed), letters),) for letters in (3, 100, 700)]
    rolling = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert own.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True) == pytest.approx(
        rolling, abs=1e-3 * 700 / 256
    )
    settings = {"until": ["e", "\n"], "max_gen_toks": 20, "do_sample": False}
    prompts = [(context, dict(settings)) for context, _ in asked[::5] if context]
    prompts += [("one e", {"until": "ee", "max_gen_toks": 6}), ("two", {"max_new_tokens": 5, "temperature": 0.0})]
    assert own.generate_until(requests("generate_until", *prompts), disable_tqdm=True) == theirs.generate_until(
        requests("generate_until", *prompts), disable_tqdm=True
    )


@pytest.fixture(scope="module")
def folder(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


def hf(folder: Path, tokenizer: Path | None = None) -> HFLM:
    return HFLM(pretrained=str(folder), tokenizer=str(tokenizer or folder), dtype="float32", device="cpu", batch_size=1)


def test_figures_are_those_of_the_harness_itself(folder: Path) -> None:
    with ZeroinfLM(str(folder), dtype="float32") as own:
        assert_like(own, hf(folder))


def test_int4_weights_give_the_figures_of_the_expanded_model(folder: Path, tmp_path: Path) -> None:
    with ZeroinfLM(str(folder), dtype="float32", wire="int4") as own:
        assert_like(own, hf(save_through_codes(folder, "int4", tmp_path / "coded"), tokenizer=folder), seed=1)


def test_equal_contexts_are_computed_once_and_many_to_a_pass(folder: Path) -> None:
    draw = random.Random(3)
    contexts = [words(draw, draw.randint(20, 90)) + "?" for _ in range(150)]
    endings = ("A", "one of them", "two", "none at all")
    asked = [(context, ending) for context in contexts for ending in endings]
    with ZeroinfLM(str(folder), dtype="float32", offload="cpu") as own:
        own.loglikelihood(requests("loglikelihood", asked[0]), disable_tqdm=True)  # another plan, for less
        found = own.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
        assert own.plan is not None and own._session is not None
        room, passes = own.plan.prefill_tokens, own._session.model.engine.stats().passes
    whole = [
        [len(own.tok_encode(context)), *(len(own.tok_encode(context + e)) for e in endings)] for context in contexts
    ]
    lengths = sorted((alone + sum(each - alone - 1 for each in more) for alone, *more in whole), reverse=True)
    assert passes <= computed(lengths, room) < len(contexts) / 4
    assert len(found) == 600


def computed(lengths: Sequence[int], room: int) -> int:
    """Passes over sequences of these lengths, the longest first, each of as many as surely fit."""
    for passes in count():
        if not lengths:
            return passes
        lengths = lengths[max(1, room // lengths[0]) :]
    raise AssertionError


def test_a_model_that_was_planned_for_as_much_is_used_again(folder: Path) -> None:
    with ZeroinfLM(str(folder), dtype="float32") as own:
        own.loglikelihood(requests("loglikelihood", ("a longer context", " and more"), ("b", "c")), disable_tqdm=True)
        first = own._session
        own.loglikelihood(requests("loglikelihood", ("short", "er")), disable_tqdm=True)
        assert own._session is first
        prompt = ("a", {"max_gen_toks": 3, "until": []})
        own.generate_until(requests("generate_until", prompt), disable_tqdm=True)
        assert own._session is not first


def write_tasks(folder: Path, docs: int = 6) -> Path:
    """Three tasks that need no network."""
    lines = [
        {"question": f"The capital of {land} is", "answer": index % 4, "text": f"{land} has a capital and a river."}
        for index, land in enumerate(COUNTRIES[:docs])
    ]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    kinds: Mapping[str, dict[str, Any]] = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": list(CHOICES),
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "local_answer": {
            "output_type": "generate_until",
            "doc_to_target": " Paris",
            "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, own in kinds.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **own}))  # JSON is YAML
    return folder


def answers(results: Any) -> dict[str, list[Any]]:
    """What the model gave for each document of each task."""
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in results["samples"].items()
    }


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.full
@pytest.mark.usefixtures("offline")
def test_tasks_of_a_real_model_come_to_the_same(tmp_path: Path) -> None:
    """SmolLM2, whose layers are streamed, beside the harness's own model."""
    weights = convert_gguf(demo_file())
    how: dict[str, Any] = {
        "tasks": list(TASKS),
        "task_manager": TaskManager(include_path=str(write_tasks(tmp_path, docs=4)), include_defaults=False),
        "bootstrap_iters": 0,
    }
    with ZeroinfLM(str(weights), dtype="float32", offload="cpu") as own:
        found = simple_evaluate(model=own, **how)
        chat = [{"role": "user", "content": "Hello"}]
        theirs = hf(weights)
        assert own.apply_chat_template(chat) == theirs.apply_chat_template(chat)
        assert own.chat_template(True) == theirs.chat_template(True)
        assert own.max_length == theirs.max_length
        assert own.tokenizer_name
    wanted = simple_evaluate(model=theirs, **how)
    assert found is not None and wanted is not None
    told, right = answers(found), answers(wanted)
    assert told["local_answer"] == right["local_answer"]
    for ours, other in zip(told["local_choice"], right["local_choice"], strict=True):
        for ((log, greedy),), ((wanted_log, wanted_greedy),) in zip(ours, other, strict=True):
            assert (float(log), greedy) == (pytest.approx(float(wanted_log), abs=1e-3), wanted_greedy)
    for ours, other in zip(told["local_text"], right["local_text"], strict=True):
        assert float(ours[0][0]) == pytest.approx(float(other[0][0]), abs=1e-3)
    for task in TASKS:
        for name, value in found["results"][task].items():
            if isinstance(value, float):
                assert value == pytest.approx(wanted["results"][task][name], rel=1e-4), (task, name)


@pytest.mark.usefixtures("offline")
def test_answers_that_are_in_the_harness_s_cache_are_not_asked_again(folder: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "tasks": list(TASKS),
        "use_cache": str(tmp_path / "answers"),
        "task_manager": TaskManager(include_path=str(write_tasks(tmp_path, docs=2)), include_defaults=False),
        "bootstrap_iters": 0,
    }
    with ZeroinfLM(str(folder), dtype="float32") as first:
        found = simple_evaluate(model=first, **how)
        assert first.plan is not None
    with ZeroinfLM(str(folder), dtype="float32") as second:
        assert answers(simple_evaluate(model=second, **how)) == answers(found)
        assert second.plan is None


@pytest.mark.full
def test_ranks_share_the_work(folder: Path) -> None:
    asked = questions(seed=5)
    with ZeroinfLM(str(folder), dtype="float32") as alone, ZeroinfLM(str(folder), dtype="float32", num_gpus=2) as two:
        assert two.world_size == 1
        wanted = alone.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
        found = two.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    assert [log for log, _ in found] == pytest.approx([log for log, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_ranks_of_a_launcher_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UsageError, match="a launcher has started ranks"):
        ZeroinfLM(str(folder))


def test_a_model_with_an_encoder_is_refused_by_name(small_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="T5ForConditionalGeneration has an encoder"):
        ZeroinfLM(str(small_checkpoint("t5")))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ofload": "cpu"}, "no option ofload"),
        ({"model": "demo"}, "no option model"),
        ({"max_new_tokens": 5}, "no option max_new_tokens"),
        ({"wire": "int5"}, "wire='int5'"),
        ({"gpu_memory": "much"}, "much"),
        ({"max_batch_size": 4}, "max_batch_size has no effect"),
        ({"device": "cuda:1"}, "device cuda:1"),
        ({"batch_size": "many"}, "batch_size 'many'"),
        ({"think_end_token": 7}, "think_end_token 7"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(given: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=words):
        ZeroinfLM(str(folder), **given)


def test_settings_of_tasks_are_taken_or_refused_by_name(folder: Path) -> None:
    with ZeroinfLM(str(folder), dtype="float32", batch_size="auto", max_gen_toks=3) as own:
        for given, message in (
            ({"num_beams": 4}, "num_beams cannot be asked for"),
            ({"max_gen_toks": 400}, "400 tokens to generate"),
            ({"do_sample": True, "top_p": 3}, "top_p must lie"),
        ):
            with pytest.raises(UsageError, match=message):
                own.generate_until(requests("generate_until", ("a", given)))
        sampled = {"do_sample": True, "temperature": 5.0, "top_k": 50, "num_beams": 1}
        asked = requests("generate_until", *[("abc", dict(sampled)) for _ in range(6)])
        found = own.generate_until(asked, disable_tqdm=True)
        assert len(set(found)) > 1
        assert found == own.generate_until(asked, disable_tqdm=True)


def test_the_command_line_is_the_harness_s_with_zeroinf_as_the_model() -> None:
    given = ("--tasks", "arc_easy", "--limit", "3")
    assert with_model(given) == with_model(("run", *given)) == ["run", "--model", "zeroinf", *given]
    for left in (("ls", "tasks"), ("--help",), ("run", "--help"), ("run", "--config", "my.yaml")):
        assert with_model(left) == list(left)
    assert with_model(("--model=hf", *given)) == ["run", "--model=hf", *given]
