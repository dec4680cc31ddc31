"""A checkpoint's generation config in whole runs: tokens are transformers', or it is refused before weights load."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import read_jsonl, write_jsonl
from small_models import PAD, VOCABULARY, auto_class
from transformers import AutoTokenizer

import zeroinf
from zeroinf.distributed.world import World
from zeroinf.errors import InputError, ModelError
from zeroinf.generation.row import Sampling
from zeroinf.options.options import RunOptions
from zeroinf.runs.evaluate import evaluate
from zeroinf.runs.runner import run_job

CPU = torch.device("cpu")
NEW = 8
PROMPTS = ("One", "A prompt of some length", "x")

Checkpoint = Callable[..., Path]


class LoadListener:
    """An observer that keeps what it is told in words."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *heard: None


@pytest.fixture
def checkpoint(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> Checkpoint:
    """`checkpoint(name, file=..., **settings)`: a small model with those settings in that file."""

    def make(name: str, file: str = "generation_config.json", **settings: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(small_checkpoint(name), folder)
        if file == "config.json":
            (folder / "generation_config.json").unlink()
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **settings}))
        return folder

    return make


def run(folder: Path, tmp_path: Path, *requests: dict[str, Any], engine: str = "stream") -> tuple[Any, list[str]]:
    """The outcome, and what the user was told."""
    listener = LoadListener()
    options = RunOptions(
        model=str(folder),
        sampling=Sampling(max_new_tokens=NEW, logprobs=0),
        offload="none" if engine == "resident" else "cpu",
        dtype="float32",
        engine=engine,
        input_files=(str(write_jsonl(tmp_path / "in.jsonl", requests)),),
        output_file=tmp_path / "out.jsonl",
    )
    return run_job(options, World(), CPU, sys.stdout, listener), listener.notes


def ours(folder: Path, tmp_path: Path, engine: str = "stream") -> tuple[list[list[int]], list[str]]:
    _, notes = run(folder, tmp_path, *({"prompt": prompt} for prompt in PROMPTS), engine=engine)
    return [[one["id"] for one in line["logprobs"]] for line in read_jsonl(tmp_path / "out.jsonl")], notes


def by_transformers(name: str, folder: Path) -> list[list[int]]:
    model, tokenizer = (
        auto_class(name).from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(
            **given, do_sample=False, num_beams=1, max_new_tokens=NEW, pad_token_id=PAD, tokenizer=tokenizer
        )
        found.append(out[0, 1 if model.config.is_encoder_decoder else given["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.parametrize(
    ("name", "file", "settings"),
    [
        (
            "llama",
            "generation_config.json",
            {"bad_words_ids": [[7]], "min_new_tokens": 4},
        ),
        ("llama", "config.json", {"no_repeat_ngram_size": 1, "bad_words_ids": [[9, 8], [200]]}),
        ("bart", "generation_config.json", {"num_beams": 4, "bad_words_ids": [[7]], "forced_eos_token_id": 2}),
        ("bart", "config.json", {"num_beams": 4, "min_length": 6, "forced_bos_token_id": 11, "early_stopping": True}),
        ("t5", "generation_config.json", {"exponential_decay_length_penalty": [1, 1.4], "suppress_tokens": [5, 6]}),
    ],
)
def test_tokens_are_those_that_transformers_makes_of_the_same_files(
    name: str, file: str, settings: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(name, file, **settings)
    tokens, notes = ours(folder, tmp_path)
    assert tokens == by_transformers(name, folder)
    assert ["num_beams 4" in note for note in notes] == [True] * ("num_beams" in settings)


def test_stop_strings_of_the_generation_config_end_rows_unless_they_ignore_the_models_end(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    free, tokenizer = by_transformers("llama", folder), AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(token) for token in free[1][1:-1]]
    stop = next(text for text in texts if "\ufffd" not in text)  # the others are parts of characters
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "stop_strings": [stop]}))
    tokens, _ = ours(folder, tmp_path)
    assert tokens == by_transformers("llama", folder) != free
    (elsewhere := tmp_path / "elsewhere").mkdir()
    run(folder, elsewhere, {"prompt": PROMPTS[1], "ignore_eos": True})
    assert [line["completion_tokens"] for line in read_jsonl(elsewhere / "out.jsonl")] == [NEW]


@pytest.mark.parametrize("engine", ["stream", "zero", "resident", "accelerate", "tensor-parallel"])
def test_every_engine_refuses_before_weights_are_loaded_what_is_not_carried_out(
    engine: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama", guidance_scale=1.5)
    monkeypatch.setattr("zeroinf.service.loaded.load_engine", lambda *given: pytest.fail("weights are loaded"))
    with pytest.raises(ModelError, match=r"guidance_scale 1\.5"):
        run(folder, tmp_path, {"prompt": "x"}, engine=engine)
    with pytest.raises(ModelError, match="guidance_scale"):
        zeroinf.pipeline(str(folder), engine=engine)
    with pytest.raises(ModelError, match="guidance_scale"):
        zeroinf.generate(str(folder), ["x"], engine=engine)
    (tmp_path / "text.txt").write_text("some text to predict")
    options = RunOptions(model=str(folder), sampling=Sampling(max_new_tokens=1), engine=engine)
    with pytest.raises(ModelError, match="guidance_scale"):
        evaluate(options, tmp_path / "text.txt", None, CPU, LoadListener())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("llama", {"bad_words_ids": [[VOCABULARY]]}, "cannot be carried out"),
        ("llama", {"early_stopping": "soon"}, "cannot be read"),
        ("llama", "{", "cannot be read"),
        ("bart", {"decoder_start_token_id": VOCABULARY}, f"begin with token {VOCABULARY}"),
    ],
)
def test_a_generation_config_that_cannot_be_is_refused_in_words(
    name: str, content: dict[str, Any] | str, words: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(name, **(content if isinstance(content, dict) else {}))
    if isinstance(content, str):
        (folder / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=words):
        run(folder, tmp_path, {"prompt": "x"})


def test_what_pads_and_what_ends_may_lie_beyond_the_embeddings(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("llama", eos_token_id=[VOCABULARY + 3, 2], pad_token_id=VOCABULARY + 4)
    assert ours(folder, tmp_path)[0] == by_transformers("llama", folder)


def test_requests_are_told_what_they_decide_and_refused_where_they_cannot(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint("llama", do_sample=True, top_p=0.9, min_p=0.1)
    outcome, notes = run(folder, tmp_path, {"prompt": "x"}, {"prompt": "y", "temperature": 0.5})
    assert (outcome.requests, outcome.refused) == (1, 1)
    (refused,) = read_jsonl(tmp_path / "out.jsonl.errors.jsonl")
    assert refused["line"] == 2 and "min_p 0.1" in refused["error"]
    assert len(notes) == 1 and "do_sample True, top_p 0.9" in notes[0]
    with (
        pytest.warns(UserWarning, match="do_sample True"),
        zeroinf.pipeline(str(folder), max_prompt_tokens=16, max_new_tokens=4, batch_size=1) as pipe,
        pytest.raises(InputError, match=r"prompt 0: .*min_p 0\.1"),
    ):
        pipe("x", temperature=0.5)
