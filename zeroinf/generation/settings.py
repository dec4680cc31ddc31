"""Checks a model's generation config: each setting is applied, has no effect here, or is refused by name.

The reference is transformers' greedy search with the same config. Length and sampling come from each request; `notes`
names settings of the config that therefore have no effect. Nothing is ignored silently: a setting that is not in the
table is refused if transformers knows it, and noted if transformers does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import GenerationConfig

from zeroinf.errors import ModelError

Fate = Literal["applied", "idle", "the request's", "refused", "refused if sampled"]


@dataclass(frozen=True, slots=True)
class SettingRule:
    """`why` explains the fate; `off` tells values that ask for nothing (None always does)."""

    fate: Fate
    why: str
    off: Callable[[Any], bool] = lambda value: False

    def asks(self, value: Any) -> bool:
        """Whether `value` asks for anything."""
        return value is not None and not self.off(value)


def _is(*values: object) -> Callable[[Any], bool]:
    return lambda value: value in values


def _outside_0_to_1(value: Any) -> bool:
    return not 0 < value < 1


_SCORES = "a logits processor of transformers, called for rows of one length at a time"
_LENGTH = "each request has its own max_new_tokens"
_HOW = "each request is greedy, or sampled by its own temperature, top_p and top_k"
_BEAMS = "only beam search reads it"
_CACHE = "the cache holds the same keys and values, wherever they lie"
_OUTPUT = "says what `generate` returns beside tokens"
_SPEED = "speculation changes when tokens are known, not which they are"
_COMPILED = "compiled or not, it is the same forward"
_FILTER = "a filter of sampling that requests cannot ask for"
_METHOD = "another way to choose tokens, which is not built here"

SETTINGS: dict[str, SettingRule] = {
    # Length
    "max_length": SettingRule("idle", _LENGTH),
    "max_new_tokens": SettingRule("idle", _LENGTH),
    "min_length": SettingRule("applied", _SCORES),
    "min_new_tokens": SettingRule("applied", "overrides min_length; " + _SCORES),
    "early_stopping": SettingRule("idle", _BEAMS),
    "max_time": SettingRule("refused", "how far a row comes would depend on the machine"),
    "stop_strings": SettingRule("applied", "they end rows as `--stop` does"),
    # Strategy
    "do_sample": SettingRule("the request's", _HOW, _is(False)),
    "num_beams": SettingRule("the request's", "rows are decoded without beams", _is(1)),
    "num_beam_groups": SettingRule("idle", _BEAMS),
    "diversity_penalty": SettingRule("idle", _BEAMS),
    "length_penalty": SettingRule("idle", _BEAMS),
    "constraints": SettingRule("refused", _METHOD),
    "force_words_ids": SettingRule("refused", _METHOD),
    "penalty_alpha": SettingRule("refused", _METHOD, _is(0)),
    "dola_layers": SettingRule("refused", _METHOD),
    "low_memory": SettingRule("idle", "only contrastive search reads it, which penalty_alpha asks for"),
    "num_return_sequences": SettingRule("refused", "a request has one completion", _is(1)),
    "token_healing": SettingRule("refused", "prompts are taken as they are", _is(False)),
    # Cache
    "use_cache": SettingRule("idle", _CACHE),
    "cache_implementation": SettingRule("refused", "only a quantized cache changes tokens", lambda v: v != "quantized"),
    "cache_config": SettingRule("idle", "only a quantized cache reads it, which cache_implementation asks for"),
    "max_cache_len": SettingRule("idle", _CACHE),
    "prefill_chunk_size": SettingRule("idle", "prompts are computed in parts of their own"),
    # Sampling
    "temperature": SettingRule("the request's", _HOW, _is(1.0)),
    "top_k": SettingRule("the request's", _HOW, _is(0)),
    "top_p": SettingRule("the request's", _HOW, _is(1.0)),
    "min_p": SettingRule("refused if sampled", _FILTER, _is(0.0)),
    "top_h": SettingRule("refused if sampled", _FILTER),
    "typical_p": SettingRule("refused if sampled", _FILTER, lambda value: value >= 1.0),
    "epsilon_cutoff": SettingRule("refused if sampled", _FILTER, _outside_0_to_1),
    "eta_cutoff": SettingRule("refused if sampled", _FILTER, _outside_0_to_1),
    # Scores
    "repetition_penalty": SettingRule("applied", _SCORES),
    "no_repeat_ngram_size": SettingRule("applied", _SCORES),
    "bad_words_ids": SettingRule("applied", _SCORES),
    "sequence_bias": SettingRule("applied", _SCORES),
    "suppress_tokens": SettingRule("applied", _SCORES),
    "begin_suppress_tokens": SettingRule("applied", _SCORES),
    "forced_bos_token_id": SettingRule("applied", _SCORES),
    "forced_eos_token_id": SettingRule("applied", _SCORES),
    "exponential_decay_length_penalty": SettingRule("applied", _SCORES),
    "renormalize_logits": SettingRule("applied", _SCORES),
    "remove_invalid_values": SettingRule("applied", "rows go on where scores are no numbers; " + _SCORES),
    "encoder_repetition_penalty": SettingRule("refused", "processors do not see the encoder's tokens", _is(1.0)),
    "encoder_no_repeat_ngram_size": SettingRule("refused", "processors do not see the encoder's tokens", _is(0)),
    "guidance_scale": SettingRule("refused", "it takes a second forward for each token", _is(1)),
    "watermarking_config": SettingRule("refused", "some watermarks keep a state for each row of a batch"),
    # What comes out
    "output_attentions": SettingRule("idle", _OUTPUT),
    "output_hidden_states": SettingRule("idle", _OUTPUT),
    "output_scores": SettingRule("idle", _OUTPUT),
    "output_logits": SettingRule("idle", _OUTPUT),
    "return_dict_in_generate": SettingRule("idle", _OUTPUT),
    # Special tokens
    "pad_token_id": SettingRule("idle", "no model sees what pads"),
    "bos_token_id": SettingRule("applied", "decoders begin with it where there is no decoder_start_token_id"),
    "eos_token_id": SettingRule("applied", "ends rows"),
    "decoder_start_token_id": SettingRule("applied", "decoders begin with it"),
    # Speculation
    "use_mtp": SettingRule("idle", _SPEED),
    "is_assistant": SettingRule("refused", "an assistant ends where it is not sure", _is(False)),
    "num_assistant_tokens": SettingRule("idle", _SPEED),
    "num_assistant_tokens_schedule": SettingRule("idle", _SPEED),
    "assistant_confidence_threshold": SettingRule("idle", "only an assistant reads it, which is_assistant asks for"),
    "prompt_lookup_num_tokens": SettingRule("idle", _SPEED),
    "max_matching_ngram_size": SettingRule("idle", _SPEED),
    "assistant_early_exit": SettingRule("idle", _SPEED),
    "assistant_lookbehind": SettingRule("idle", _SPEED),
    "target_lookbehind": SettingRule("idle", _SPEED),
    "assistant_ensemble_weight": SettingRule("refused", "it lets an assistant change what is sampled"),
    "speculation_type": SettingRule("idle", _SPEED),
    # Speed
    "compile_config": SettingRule("idle", _COMPILED),
    "disable_compile": SettingRule("idle", _COMPILED),
    "continuous_batching_config": SettingRule("idle", "only transformers' own continuous batching reads it"),
    "transformers_version": SettingRule("idle", "says what wrote the file"),
}
"""Every field of transformers' GenerationConfig, 5.17 to 5.24, but its own notes, which begin with an underscore."""


def check_settings(config: GenerationConfig) -> None:
    """Raises ModelError that names what `config` asks for and is not carried out."""
    if refused := [*_asked(config, "refused"), *_not_in_the_table(config, known=True)]:
        raise ModelError(
            f"the model's generation config has {_told(config, refused)}, which zeroinf does not carry out",
            hint="remove it from generation_config.json (without such a file: config.json) to run without it",
        )


def refuse_sampling(config: GenerationConfig) -> str | None:
    """Why requests of a model with `config` cannot be sampled; None where they can."""
    filters = list(_asked(config, "refused if sampled"))
    if not filters:
        return None
    return f"the model's generation config has {_told(config, filters)}, which zeroinf does not apply to samples"


def notes(config: GenerationConfig, *, sampled: bool) -> list[str]:
    """Sentences on what `config` asks for and requests decide instead, or nobody reads; `sampled`: some are sampled."""
    said = []
    if config.num_beams is not None and config.num_beams > 1:
        said.append(f"the model's generation config asks for beam search (num_beams {config.num_beams}): not done here")
    own = [name for name in _asked(config, "the request's") if name != "num_beams"]
    if own and (config.do_sample or sampled):
        how = f"the model's generation config has {_told(config, own)}"
        said.append(f"{how}: rows are greedy, or sampled by the settings of their requests alone")
    if unread := _not_in_the_table(config, known=False):
        said.append(f"the model's generation config has {_told(config, unread)}: unknown to transformers, no effect")
    return said


def _asked(config: GenerationConfig, fate: Fate) -> Iterator[str]:
    for name, setting in SETTINGS.items():
        if setting.fate == fate and setting.asks(getattr(config, name, None)):
            yield name


def _not_in_the_table(config: GenerationConfig, *, known: bool) -> list[str]:
    """Fields that the table lacks. `known`: every config of transformers has them, and `generate` may read them; this
    one has another value. Else: only this one has them, and `generate` cannot read what other configs lack."""
    fresh = vars(GenerationConfig())
    names = [name for name in vars(config) if name not in SETTINGS and not name.startswith("_")]
    found = [name for name in names if getattr(config, name) not in (None, fresh.get(name))]
    return [name for name in found if (name in fresh) == known]


def _told(config: GenerationConfig, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_short(getattr(config, name))}" for name in names)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
