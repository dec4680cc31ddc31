"""Settings of a model's generation config: tokens equal to transformers' for those applied, names for those refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import PlainEngine, rows_of, run_rows
from small_models import EOS, PAD, VOCABULARY, build_model
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from zeroinf.errors import ModelError
from zeroinf.generation.micro_batch import TokenRules
from zeroinf.generation.settings import SETTINGS, check_settings, notes, refuse_sampling

PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (20,), (30, 31, 32), (40, 41, 42, 43, 44))
NEW = 10

REFUSED = {
    "assistant_ensemble_weight": 0.5,
    "cache_implementation": "quantized",
    "constraints": [1],
    "dola_layers": "high",
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "force_words_ids": [[5]],
    "guidance_scale": 1.5,
    "is_assistant": True,
    "max_time": 3.0,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "token_healing": True,
    "watermarking_config": WatermarkingConfig(),
}
IDLE = {
    "assistant_confidence_threshold": 0.7,
    "assistant_early_exit": None,
    "assistant_lookbehind": 3,
    "cache_config": {"nbits": 4},
    "cache_implementation": "dynamic",
    "compile_config": CompileConfig(),
    "continuous_batching_config": None,
    "disable_compile": True,
    "diversity_penalty": 0.0,
    "early_stopping": True,
    "length_penalty": 0.5,
    "low_memory": True,
    "max_cache_len": 99,
    "max_length": 3,
    "max_matching_ngram_size": 3,
    "max_new_tokens": 2,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": PAD,
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 2,
    "return_dict_in_generate": False,
    "speculation_type": None,
    "target_lookbehind": 3,
    "transformers_version": "9",
    "use_cache": False,
    "use_mtp": False,
}


@pytest.fixture(scope="module")
def free() -> list[list[int]]:
    """What the model says with no setting at all, from which others can be chosen so that they matter."""
    return by_transformers(build_model("llama"))


def by_transformers(model: Any, **how: Any) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, do_sample=False, num_beams=1, pad_token_id=PAD, max_new_tokens=NEW, **how)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        found.append(sequences[0, len(prompt) :].tolist())
    return found


def ours(model: Any) -> list[list[int]]:
    rows = rows_of(PROMPTS, NEW)
    run_rows(PlainEngine(model), rows, draw=3, rows=3, pages=5, micro_batch_rows=2, prefill_tokens=4)
    return [row.generated for row in rows]


def applied(free: list[list[int]]) -> dict[str, dict[str, Any]]:
    """For each setting that is applied, values with which it changes some token."""
    first, second, ends = free[0][0], free[0][1], {"eos_token_id": [free[0][2], free[1][3]]}
    return {
        "bad_words_ids": {"bad_words_ids": [[first], [second, free[0][2]], [free[1][1]]]},
        "bad_words_ids of an end": {"bad_words_ids": [[EOS], [free[2][0]]]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first, free[3][0]]},
        "eos_token_id": ends,
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 1.5), **ends},
        "forced_bos_token_id": {"forced_bos_token_id": 77},
        "forced_eos_token_id": {"forced_eos_token_id": [78, 79]},
        "min_length": {"min_length": 9, **ends},
        "min_new_tokens": {"min_new_tokens": 6, "min_length": 3, **ends},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.7},
        "repetition_penalty": {"repetition_penalty": 1.8},
        "sequence_bias": {"sequence_bias": [[[first], -50.0], [[second, free[0][2]], -50.0], [[5], 0.5]]},
        "suppress_tokens": {"suppress_tokens": [first, free[1][0]]},
    }


def test_every_field_of_transformers_has_a_fate_and_a_reason() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= set(SETTINGS)
    assert all(setting.why for setting in SETTINGS.values())


@pytest.mark.parametrize("name", sorted(applied([[9] * NEW] * 4)))
def test_what_is_applied_gives_the_tokens_of_transformers(name: str, free: list[list[int]]) -> None:
    model = build_model("llama")
    for field, value in applied(free)[name].items():
        setattr(model.generation_config, field, value)
    tokens = by_transformers(model)
    assert ours(model) == tokens
    assert tokens != free, "this value changes nothing"


def test_each_setting_that_is_applied_is_compared_here_or_elsewhere() -> None:
    elsewhere = {"stop_strings", "remove_invalid_values", "bos_token_id", "decoder_start_token_id"}
    names = {field for settings in applied([[9] * NEW] * 4).values() for field in settings}
    assert {name for name, setting in SETTINGS.items() if setting.fate == "applied"} == names | elsewhere


@pytest.mark.parametrize("name", sorted(IDLE))
def test_what_is_idle_changes_no_token_of_transformers_nor_of_ours(name: str, free: list[list[int]]) -> None:
    model = build_model("llama")
    setattr(model.generation_config, name, IDLE[name])
    assert ours(model) == by_transformers(model) == free


def test_each_setting_is_tried_as_what_it_is() -> None:
    fates: dict[str, set[str]] = {}
    for name, setting in SETTINGS.items():
        fates.setdefault(setting.fate, set()).add(name)
    assert fates["refused"] == set(REFUSED)
    assert fates["idle"] == set(IDLE) - {"cache_implementation"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_carried_out_is_refused_by_name(name: str) -> None:
    config = GenerationConfig(eos_token_id=EOS)
    setattr(config, name, REFUSED[name])
    with pytest.raises(ModelError, match=name):
        check_settings(config)


@pytest.mark.parametrize(
    "neutral",
    [
        {"guidance_scale": 1.0},
        {"num_return_sequences": 1},
        {"encoder_no_repeat_ngram_size": 0},
        {"token_healing": False},
    ],
)
def test_values_that_ask_for_nothing_pass(neutral: dict[str, Any]) -> None:
    check_settings(GenerationConfig(**neutral))


def test_a_field_of_a_newer_transformers_is_refused_and_one_of_nobody_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    own = GenerationConfig(chat_format="chatml", repetition_penality=1.3)
    check_settings(own)
    (note,) = notes(own, sampled=False)
    assert "chat_format chatml, repetition_penality 1.3" in note and "unknown to transformers" in note
    before = GenerationConfig.__init__

    def newer(self: GenerationConfig, **given: Any) -> None:
        self.top_q = given.pop("top_q", 1.0)
        before(self, **given)

    monkeypatch.setattr(GenerationConfig, "__init__", newer)
    check_settings(GenerationConfig())
    with pytest.raises(ModelError, match=r"top_q 0\.5"):
        check_settings(GenerationConfig(top_q=0.5))


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("min_p", 0.1, 0.0),
        ("top_h", 0.4, None),
        ("typical_p", 0.9, 1.0),
        ("epsilon_cutoff", 3e-4, 0.0),
        ("eta_cutoff", 3e-4, 0.0),
    ],
)
def test_filters_that_requests_cannot_ask_for_are_no_matter_of_greedy_rows(
    name: str, value: float, neutral: float | None
) -> None:
    config = GenerationConfig(**{name: value})
    check_settings(config)
    assert name in (refuse_sampling(config) or "")
    assert refuse_sampling(GenerationConfig(**{name: neutral})) is None
    assert {key for key, setting in SETTINGS.items() if setting.fate == "refused if sampled"} >= {name}


def test_what_requests_decide_instead_is_said_once() -> None:
    assert notes(GenerationConfig(temperature=0.6, top_p=0.9), sampled=False) == [], "as in transformers"
    (note,) = notes(GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9), sampled=False)
    assert "do_sample True, temperature 0.6, top_p 0.9" in note and "greedy" in note
    assert len(notes(GenerationConfig(top_k=20), sampled=True)) == 1
    (note,) = notes(GenerationConfig(num_beams=4, length_penalty=2.0), sampled=False)
    assert "num_beams 4" in note


@pytest.mark.parametrize(
    "broken",
    [
        {"bad_words_ids": [[VOCABULARY]]},
        {"bad_words_ids": []},
        {"forced_bos_token_id": VOCABULARY},
        {"forced_eos_token_id": VOCABULARY},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": VOCABULARY},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": None},
        {"exponential_decay_length_penalty": 3},
        {"repetition_penalty": -1.0},
        {"sequence_bias": {"a": 1}},
    ],
)
def test_what_transformers_could_not_carry_out_is_refused_before_anything_runs(broken: dict[str, Any]) -> None:
    model = build_model("llama")
    for name, value in broken.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ModelError, match="generation config"):
        TokenRules(model, PAD, ()).try_out(VOCABULARY)
