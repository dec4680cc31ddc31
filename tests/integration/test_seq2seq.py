"""Models with an encoder give the greedy tokens of transformers' `generate`, wherever their weights rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import run_cell
from generating import run_rows, words
from observers import Deaf
from ranks import on_ranks
from small_models import SEQ2SEQ_MODELS, auto_class, build_tokenizer
from tiers import tiered

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.stream.engine import StreamEngine
from zeroinf.errors import UsageError
from zeroinf.generation.prompts import decoder_start
from zeroinf.generation.row import Row, Sampling
from zeroinf.model.inspect import find_blocks, read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.planner.memory import pieces
from zeroinf.planner.plan import Plan
from zeroinf.runs.evaluate import evaluate

NEW_TOKENS = 9
# Two batches of three at the most, all of them padded.
PROMPTS = ("One", "A prompt of some length, so that its neighbours are padded", "Two words", "x", "The end of it all")
BATCH_SIZE = 3


def cell(folder: Path, work: Path, offload: str, **changed: Any) -> dict[str, Any]:
    """A run of the driver, with its own folder for files."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return {
        "name": offload,
        "model": str(folder),
        "dtype": "auto",
        "parallel": {},
        "engine": "stream",
        "fetch": "auto",
        "offload": offload,
        "nvme_path": str(work),
        "input": str(work / "prompts.txt"),
        "batch_size": BATCH_SIZE,
        "max_new_tokens": NEW_TOKENS,
        **changed,
    }


def by_transformers(name: str, folder: Path, prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """What `generate` makes of all prompts in one batch, to the end of each row."""
    model = auto_class(name).from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    given = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    rows = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)[:, 1:].tolist()
    eos = model.generation_config.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row[:NEW_TOKENS] for row in rows]


def tokens(found: dict[str, Any]) -> list[list[int]]:
    return [found["tokens"][index] for index in sorted(found["tokens"])]


@pytest.mark.parametrize("name", tiered(sorted(SEQ2SEQ_MODELS), ("bart", "t5", "t5_own_head")))
def test_tokens_are_those_of_generate(name: str, small_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = small_checkpoint(name)
    found = run_cell(cell(folder, tmp_path, "cpu"), World(), Control(World(), "cpu"))
    assert tokens(found) == by_transformers(name, folder)
    assert len({token for row in tokens(found) for token in row}) > 4, "they repeat a few tokens"


@pytest.mark.parametrize("name", tiered(["bart", "t5"], ("t5",)))
def test_two_ranks_and_every_tier_give_the_same_tokens(
    name: str, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = small_checkpoint(name)
    cells = [cell(folder, tmp_path / offload, offload) for offload in ("none", "cpu", "nvme")]

    def body(control: Control) -> list[dict[str, Any]]:
        shared, found = control.store, []
        for each in cells:
            control.store = torch.distributed.PrefixStore(each["name"], shared)
            found.append(run_cell(each, control.world, control))
        return found

    ranks, _ = on_ranks(2, body, seconds=120)
    wanted = by_transformers(name, folder)
    for number, each in enumerate(cells):
        parts = [rank[number] for rank in ranks]
        assert all(part["tokens"] for part in parts), "a rank had nothing to do"
        assert tokens({"tokens": parts[0]["tokens"] | parts[1]["tokens"]}) == wanted, each["name"]


def stream(folder: Path, **where: Any) -> StreamEngine:
    """An engine with its weights in host memory, or as `where` says in the plan's terms."""
    source = resolve_model(str(folder))
    anatomy = read_anatomy(source.config, dtype="float32")
    fields = {"offload": "cpu", "world_size": 1, "batch_size": BATCH_SIZE, **where}
    plan = Plan(anatomy=anatomy, engine="stream", dtype="float32", device="cpu", **fields)
    return StreamEngine(plan, source, Control(World(), "cpu"), torch.device("cpu"))


def rows_of_prompts(engine: StreamEngine) -> list[Row]:
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    start, tokenizer = decoder_start(engine.model), build_tokenizer()
    sources = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return [
        Row(index=i, prompt=[start], source=source, sampling=sampling, decode=words) for i, source in enumerate(sources)
    ]


# MBART counts its decoder's positions from the first column on: rows of unlike lengths would not get on together.
@pytest.mark.parametrize("name", ["mbart", "t5"])
def test_rows_that_run_out_of_memory_go_on_in_halves(name: str, small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint(name)
    engine = stream(folder)
    rows, seen = rows_of_prompts(engine), []

    def break_down(module: Any, inputs: Any) -> None:
        seen.append(tuple(inputs[0].shape[:2]))
        if len(seen) > 4 and len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("no memory, the test says")

    find_blocks(engine.model)[1][1].register_forward_pre_hook(break_down)
    run_rows(engine, rows, rows=BATCH_SIZE)
    assert [shape for shape in seen if shape[1] > 1] == [(2, 5), (1, 5)], "a row that is new has joined the others"
    assert [row.generated for row in rows] == by_transformers(name, folder)


def test_eval_wants_a_model_that_predicts(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A text.")
    options = RunOptions(model=str(small_checkpoint("t5")), sampling=Sampling(max_new_tokens=1))
    with pytest.raises(UsageError, match="T5ForConditionalGeneration has an encoder"):
        evaluate(options, tmp_path / "text.txt", None, torch.device("cpu"), Deaf())


def test_an_encoder_crosses_the_link_once_for_its_prompts(small_checkpoint: Callable[[str], Path]) -> None:
    engine = stream(small_checkpoint("t5"), resident_blocks=1)
    rows = rows_of_prompts(engine)
    run_rows(engine, rows, rows=BATCH_SIZE)
    stats, sizes = engine.stats(), pieces(read_anatomy(engine.model.config, dtype="float32"))
    assert stats.encodings == 2, "two micro-batches"
    assert stats.passes == 2 * NEW_TOKENS
    # What stays is a block of the decoder, which has more to do.
    assert stats.streamed_bytes_per_encoding == sum(sizes[:3])
    assert stats.streamed_bytes_per_pass in sizes[3:]
    assert stats.streamed_bytes == 2 * sum(sizes[:3]) + stats.passes * stats.streamed_bytes_per_pass
