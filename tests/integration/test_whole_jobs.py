"""Jobs from requests to results in this process, through the stream engine on the CPU."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import read_jsonl, write_jsonl
from observers import Deaf
from small_models import CONTEXT, VOCABULARY, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import zeroinf
from zeroinf.distributed.world import World
from zeroinf.errors import InputError, UsageError
from zeroinf.generation.groups import Group
from zeroinf.generation.pass_counts import Counts
from zeroinf.generation.row import Sampling
from zeroinf.model.demo import demo_file
from zeroinf.model.gguf.convert import convert_gguf
from zeroinf.options.options import RunOptions
from zeroinf.runs.evaluate import evaluate
from zeroinf.runs.runner import run_job

CPU = torch.device("cpu")
EOS_TOKEN = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def run(model: Path, requests: Path, output: Path | None, **options: Any) -> Any:
    asked = {"sampling": Sampling(max_new_tokens=4), "offload": "cpu", "dtype": "float32", **options}
    asked |= {"model": str(model), "input_files": (str(requests),), "output_file": output}
    outcome = run_job(RunOptions(**asked), World(), CPU, sys.stdout, Deaf())
    assert outcome is not None and outcome.report is not None
    return outcome.report


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with another end token than the one that ends its turns."""
    folder, ours = convert_gguf(demo_file()), tmp_path_factory.mktemp("smollm")
    for file in folder.iterdir():
        if file.name not in ("generation_config.json", "tokenizer_config.json"):
            (ours / file.name).symlink_to(file)
    for name, end in (("generation_config.json", {"eos_token_id": 0}), ("tokenizer_config.json", EOS_TOKEN)):
        (ours / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **end}))
    return ours


@pytest.fixture(scope="module")
def model(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


def test_random_lengths_fill_the_pool_as_long_as_rows_wait_and_never_more(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, count = random.Random(3), 160
    entries = [
        {"prompt": "word " * draw.randint(1, 12), "max_new_tokens": draw.randint(1, 90), "ignore_eos": True}
        for _ in range(count)
    ]
    used, begun = list[int](), [set[int]()]
    add = Counts.add

    def noted(self: Counts, groups: Sequence[Group], pages: int) -> None:
        add(self, groups, pages)
        used.append(pages)
        begun.append(begun[-1] | {seat.row.index for group in groups for seat in group.seats})

    monkeypatch.setattr(Counts, "add", noted)
    report = run(model, write_jsonl(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl", batch_size=16)
    pool = report.ranks[0].pool_pages
    steady = [pages for pages, seen in zip(used, begun, strict=False) if len(seen) < count][1:]
    found = read_jsonl(tmp_path / "out.jsonl")
    assert [line["completion_tokens"] for line in found] == [entry["max_new_tokens"] for entry in entries]
    assert max(used) <= pool
    assert len(steady) > 100
    assert sum(steady) / len(steady) >= 0.9 * pool


def test_logprobs_are_in_every_format_and_survive_the_journal(model: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    entries = [{"prompt": "one", "logprobs": 2}, {"prompt": "two words"}, {"prompt": "x", "logprobs": True}]
    requests = write_jsonl(tmp_path / "in.jsonl", entries)
    run(model, requests, tmp_path / "out.jsonl")
    first, second, third = read_jsonl(tmp_path / "out.jsonl")
    assert "logprobs" not in second
    assert [one["top_logprobs"] for one in third["logprobs"]] == [[]] * third["completion_tokens"]
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = [*tokenizer("one")["input_ids"], *(one["id"] for one in first["logprobs"])]
    logs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)[-5:-1]
    for one, wanted in zip(first["logprobs"], logs, strict=True):
        assert (one["token"], one["logprob"]) == (
            tokenizer.decode([one["id"]]),
            pytest.approx(wanted.max().item(), abs=1e-4),
        )
        assert [top["id"] for top in one["top_logprobs"]] == wanted.topk(2).indices.tolist()
        assert one["top_logprobs"][0] == {name: one[name] for name in ("token", "id", "logprob")}
    run(model, requests, tmp_path / "out.parquet")
    told = [row["logprobs"] for row in parquet.read_table(tmp_path / "out.parquet").to_pylist()]
    assert [each and json.loads(each) for each in told] == [first["logprobs"], None, third["logprobs"]]


@pytest.fixture(scope="module")
def beyond(shared_folder: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], Path]:
    """A small model whose tokenizer has tokens of which the model knows nothing: one, and what pads."""

    def build(name: str) -> Path:
        def fill(folder: Path) -> None:
            make_checkpoint(name, folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.add_tokens(["<beyond>"])
            tokenizer.add_special_tokens({"pad_token": "<padding>"})
            tokenizer.save_pretrained(folder)

        return shared_folder(f"beyond-{name}", fill)

    return build


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_token_that_the_model_does_not_have_refuses_its_line_and_no_other(
    name: str, beyond: Callable[[str], Path], small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    good = [{"prompt": "Once"}, {"prompt": "a longer one, beside which the other is padded"}]
    lines = write_jsonl(tmp_path / "in.jsonl", [good[0], {"prompt": "a <beyond> b"}, good[1]])
    report = run(beyond(name), lines, tmp_path / "out.jsonl")
    assert (report.requests, report.refused) == (2, 1)
    (refused,) = read_jsonl(tmp_path / "out.jsonl.errors.jsonl")
    assert refused["line"] == 2 and f"token {VOCABULARY} ('<beyond>')" in refused["error"]
    run(small_checkpoint(name), write_jsonl(tmp_path / "good.jsonl", good), tmp_path / "good.out.jsonl")
    told = [[line["completion"] for line in read_jsonl(tmp_path / file)] for file in ("out.jsonl", "good.out.jsonl")]
    assert told[0] == told[1]


def test_a_message_that_the_template_skips_is_a_system_message_or_refused(
    small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    of_two = "{% if m.role in ('system', 'user') %}{{ m.role + ':' + m.content }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + of_two + "{% endfor %}"
    tokenizer.save_pretrained(folder)
    said, user = {"content": "Answer in French."}, {"role": "user", "content": "Hi"}
    lines = [{"messages": [{"role": role, **said}, user]} for role in ("developer", "system", "assistant")]
    report = run(folder, write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    first, second = read_jsonl(tmp_path / "out.jsonl")
    assert first["prompt_tokens"] == second["prompt_tokens"] == len("system:Answer in French.user:Hi")
    assert first["completion"] == second["completion"]
    (refused,) = read_jsonl(tmp_path / "out.jsonl.errors.jsonl")
    assert report.refused == 1 and refused["line"] == 3 and "role 'assistant'" in refused["error"]


def test_python_refuses_a_prompt_that_the_model_cannot_take_before_anything_runs(
    beyond: Callable[[str], Path], small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for model, prompt, words in (
        (beyond("llama"), "a <beyond> b", "prompt 1: token 384 .*<beyond>"),
        (small_checkpoint("gpt2"), "x" * CONTEXT, "prompt 1: the prompt has 256 tokens and max_new_tokens is 4"),
    ):
        with pytest.raises(InputError, match=words):
            zeroinf.generate(str(model), ["fine", prompt], max_new_tokens=4)
    with (
        zeroinf.pipeline(str(small_checkpoint("gpt2")), max_prompt_tokens=400, max_new_tokens=4, batch_size=2) as pipe,
        pytest.raises(InputError, match="prompt 1: the prompt has 253 tokens"),
    ):
        pipe(["fine", "x" * (CONTEXT - 3)])
    text = tmp_path / "text.txt"
    text.write_text("a text with a <beyond> in it")
    with pytest.raises(InputError, match=r"cannot predict .*: token 384"):
        evaluate(RunOptions(model=str(beyond("llama")), sampling=Sampling(max_new_tokens=1)), text, None, CPU, Deaf())


@pytest.mark.parametrize(("name", "is_shared"), [("llama", True), ("gpt_oss", True), ("bloom", False)])
def test_prompts_that_begin_alike_are_computed_once_and_change_no_result(
    name: str, is_shared: bool, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    draw = random.Random(1)
    texts = [("header " * 15, "other words " * 6)[i % 3 == 0] + "abcdefghi"[: 1 + i % 8] * 2 for i in range(20)]
    draw.shuffle(texts)
    requests = write_jsonl(tmp_path / "in.jsonl", [{"id": f"r{i}", "prompt": text} for i, text in enumerate(texts)])
    lines, reports = [], []
    for share in (True, False):
        output, how = tmp_path / f"{share}.jsonl", Sampling(max_new_tokens=5, ignore_eos=True)
        reports.append(run(small_checkpoint(name), requests, output, sampling=how, share_prefixes=share, batch_size=6))
        lines.append(read_jsonl(output))
    with_it, without = reports
    assert lines[0] == lines[1] and [line["id"] for line in lines[0]] == [f"r{i}" for i in range(20)]
    assert with_it.to_json()["shared_prompt_tokens"] == with_it.shared_prompt_tokens
    assert without.shared_prompt_tokens == 0
    if not is_shared:
        assert with_it.plan.unshared_because and "no shared prefixes" in repr(with_it.plan)
        assert with_it.shared_prompt_tokens == 0 and "shared" not in repr(without.plan)
        return
    assert f"prompt tokens ({with_it.plan.prefixes.saved_share:.0%})" in repr(with_it.plan)
    assert with_it.shared_prompt_tokens >= 0.9 * with_it.plan.prefixes.saved_tokens * len(texts)
    assert sum(rank.counts.prefill_columns for rank in with_it.ranks) < 0.4 * with_it.prompt_tokens
    # Of forwards of other sizes, a search finds the best to within a hundredth or so.
    assert with_it.plan.timing.tokens_per_second >= 0.99 * without.plan.timing.tokens_per_second


def test_logprobs_are_refused_where_results_have_no_place_for_them(model: Path, tmp_path: Path) -> None:
    requests = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "one", "logprobs": 2}])
    with pytest.raises(UsageError, match="logprobs without --output-file"):
        run(model, requests, None)


def test_a_stop_string_that_is_a_special_token_ends_rows_where_transformers_does(smollm: Path, tmp_path: Path) -> None:
    """Each line has its own; the answers are those of `generate` with `stop_strings`."""
    question, stop = "What is 2+2? Reply with the number only.", "<|im_end|>"
    chat = {"messages": [{"role": "user", "content": question}]}
    cases = [
        {**chat, "stop": [stop], "logprobs": 0},
        {**chat, "stop": ["4<|im"]},
        {**chat, "stop": ["\n", "<|im_end|>\n"]},
    ]
    out = tmp_path / "out.jsonl"
    run(smollm, write_jsonl(tmp_path / "in.jsonl", cases), out, sampling=Sampling(max_new_tokens=12))
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(smollm), AutoTokenizer.from_pretrained(smollm)
    ids = tokenizer.apply_chat_template(
        chat["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    lengths = [
        theirs.generate(ids, do_sample=False, max_new_tokens=12, stop_strings=case["stop"], tokenizer=tokenizer).shape[
            1
        ]
        - ids.shape[1]
        for case in cases
    ]
    found = read_jsonl(out)
    assert [line["completion_tokens"] for line in found] == lengths
    assert [line["finish_reason"] for line in found] == ["stop"] * 3
    assert [line["completion"] for line in found] == ["2 + 2 = 4", "2 + 2 = ", "2 + 2 = 4"]
    assert lengths[0] == 8 and len(found[0]["logprobs"]) == 8 and found[0]["logprobs"][-1]["token"] == stop
