"""Every parameter of a model is in its checkpoint, tied or computed; anything else is refused before loading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from mutations import Tensors, cut, removed, renamed, rewritten
from safetensors.torch import load_file, save_file
from small_models import make_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.base import SilentListener
from zeroinf.engines.loading import load_engine
from zeroinf.errors import ModelError
from zeroinf.model.checkpoint import read_facts
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.model.source import ModelSource, pick_dtype
from zeroinf.model.weights import local_weight_files
from zeroinf.planner.plan import Plan

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def refusal(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., ModelError]:
    """The error with which a changed copy of a checkpoint is refused."""

    def get(change: Callable[[Tensors], Any], name: str = "llama", **config: Any) -> ModelError:
        folder = rewritten(small_checkpoint(name), tmp_path / "changed", change, **config)
        with pytest.raises(ModelError) as caught:
            resolve_model(str(folder))
        return caught.value

    return get


def test_a_tensor_that_is_missing_is_named_with_its_file(refusal: Callable[..., ModelError], tmp_path: Path) -> None:
    error = refusal(lambda tensors: removed(tensors, DOWN))
    assert error.message == f"{tmp_path}/changed/model.safetensors lacks 1 tensor of LlamaForCausalLM: {DOWN}"


def test_of_many_the_first_are_named_and_the_others_counted(refusal: Callable[..., ModelError]) -> None:
    error = refusal(lambda tensors: [tensors.pop(name) for name in [*tensors] if ".layers.1." in name])
    assert "lacks 9 tensors of LlamaForCausalLM: model.layers.1." in error.message
    assert error.message.endswith(" and 6 more")


@pytest.mark.parametrize(("how", "said"), [(removed, "lacks 3 tensors of .*: {}"), (cut, "holds {} .* and 2 more$")])
def test_what_all_blocks_lack_or_have_in_another_shape_is_counted_in_each(
    how: Callable[[Tensors, str], None], said: str, refusal: Callable[..., ModelError]
) -> None:
    def change(tensors: Tensors) -> None:
        for name in [*tensors]:
            if name.endswith("mlp.down_proj.weight"):
                how(tensors, name)

    assert re.search(said.format("model.layers.0.mlp.down_proj.weight"), refusal(change).message)


def test_a_tensor_under_another_name_is_missing_and_the_other_name_is_said(refusal: Callable[..., ModelError]) -> None:
    error = refusal(lambda tensors: renamed(tensors, DOWN))
    assert DOWN in error.message
    assert "model.layers.2.mlp.down_proj.other_weight" in str(error.hint)


@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel"), ("base_model.model.", "peft")],
)
def test_names_of_a_wrapper_are_said(prefix: str, wrapper: str, refusal: Callable[..., ModelError]) -> None:
    def wrap(tensors: Tensors) -> None:
        for name in [*tensors]:
            tensors[f"{prefix}{name}"] = tensors.pop(name)

    error = refusal(wrap)
    assert " tensors of LlamaForCausalLM: " in error.message
    assert f"{prefix!r}: save the model inside {wrapper}" in str(error.hint)


def test_a_tensor_of_another_shape_is_named_with_both(refusal: Callable[..., ModelError]) -> None:
    error = refusal(lambda tensors: cut(tensors, DOWN))
    assert error.message.endswith(f"holds {DOWN} as (63, 96), the model has (64, 96)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("name", "tensor"), [("llama", DOWN), ("mixtral", "model.layers.1.mlp.experts.2.w1.weight")])
def test_codes_that_nothing_explains_are_no_weights(
    name: str, tensor: str, dtype: torch.dtype, refusal: Callable[..., ModelError]
) -> None:
    def change(tensors: Tensors) -> None:
        (found,) = [one for one in tensors if one.endswith(tensor.partition("mlp.")[2]) and tensor[:15] in one]
        tensors[found] = tensors[found].to(dtype)

    assert f" as {dtype}, the model has torch.bfloat16" in refusal(change, name, dtype="bfloat16").message


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_shards_is_refused(indexed: bool, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file(tensors, folder / first, metadata={"format": "pt"})
    save_file({DOWN: tensors[DOWN].flip(0).contiguous(), "other": torch.ones(1)}, folder / second)
    named = {**dict.fromkeys(tensors, first), "other": second}
    if not indexed:
        del named[DOWN]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(ModelError, match=f"{first} and {second} both hold {re.escape(DOWN)}$"):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_that_are_fused_must_all_be_there(
    name: str, refusal: Callable[..., ModelError], small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    stored = load_file(small_checkpoint(name) / "model.safetensors")
    experts = sorted(one for one in stored if ".2." in one and ".experts.1." in one)
    assert len(experts) == 3
    for number, one in enumerate(experts):
        folder = rewritten(small_checkpoint(name), tmp_path / f"lacks-{number}", lambda t, one=one: removed(t, one))
        with pytest.raises(ModelError, match=r"lacks number 1 of|holds .* as|does not make"):
            resolve_model(str(folder))

    def move(tensors: Tensors) -> None:
        for one in experts:
            tensors[one.replace(".experts.1.", ".experts.4.")] = tensors.pop(one)

    assert "lacks number 1 of model.layers.*." in refusal(move, name).message


def test_an_attention_weight_of_a_fused_model_must_be_there(refusal: Callable[..., ModelError]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    assert name in refusal(lambda tensors: removed(tensors, name), "mixtral").message


@pytest.mark.parametrize("kind", ["named", "tied", "unnamed"])
def test_a_reward_model_is_refused(
    kind: str, refusal: Callable[..., ModelError], small_checkpoint: Callable[[str], Path]
) -> None:
    def score(tensors: Tensors) -> None:
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = torch.ones(1, 64)

    if kind == "unnamed":
        error = refusal(score, architectures=None)
        assert "lacks 1 tensor of LlamaForCausalLM: lm_head.weight" in error.message
        assert "score.weight" in str(error.hint)
        return
    error = refusal(
        score, "llama_tied" if kind == "tied" else "llama", architectures=["LlamaForSequenceClassification"]
    )
    assert "is no language model that generates: LlamaForSequenceClassification" in error.message


def test_a_tensor_that_is_stored_twice_is_refused(refusal: Callable[..., ModelError]) -> None:
    def store_twice(tensors: Tensors) -> None:
        tensors[DOWN.removeprefix("model.")] = tensors[DOWN] + 1

    assert f"holds {DOWN} twice, as " in refusal(store_twice).message


def test_an_index_that_names_what_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    resolve_model(str(folder))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = min(content["weight_map"])
    content["weight_map"]["model.layers.7.extra.weight"] = content["weight_map"][first]
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"index\.json names model\.layers\.7\.extra\.weight in .*does not hold it"):
        resolve_model(str(folder))


def test_pickles_are_accounted_for_without_their_values(tmp_path: Path) -> None:
    folder = make_checkpoint("llama_tied", tmp_path / "llama")
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "lm_head.weight" in weights
    facts = resolve_model(str(folder)).facts
    assert facts is not None
    assert (facts.untied, facts.unused) == ((), ())
    torch.save({name: value for name, value in weights.items() if name != DOWN}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"lacks 1 tensor of LlamaForCausalLM: {DOWN}"):
        resolve_model(str(folder))


def test_buffers_must_be_there_unless_the_model_computes_them(refusal: Callable[..., ModelError]) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert name in refusal(lambda tensors: removed(tensors, name), "deepseek_v3").message


def test_what_a_model_computes_need_not_be_there(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    computed = ("final_logits_bias", "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")

    def drop(tensors: Tensors) -> None:
        for name in computed:
            tensors.pop(name, None)

    source = resolve_model(str(rewritten(small_checkpoint("marian"), tmp_path / "m", drop)))
    assert source.facts is not None


def test_what_the_model_does_not_know_is_listed_but_for_what_old_releases_stored(
    small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)

    facts = resolve_model(str(rewritten(small_checkpoint("llama"), tmp_path / "m", add))).facts
    assert facts is not None
    assert facts.unused == ("model.layers.0.self_attn.q_proj.bias",)


@pytest.mark.parametrize("has_own", [True, False])
def test_a_head_that_is_stored_apart_is_counted_only_where_its_values_differ(
    has_own: bool, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def add(tensors: Tensors) -> None:
        embeddings = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embeddings.flip(0).contiguous() if has_own else embeddings.clone()

    tied = small_checkpoint("llama_tied")
    source = resolve_model(str(rewritten(tied, tmp_path / "m", add)))
    anatomy, plain = read_anatomy(source.config), read_anatomy(resolve_model(str(tied)).config)
    assert anatomy.tied == (() if has_own else plain.tied)
    assert anatomy.parameters == plain.parameters + (384 * 64 if has_own else 0)
    assert read_anatomy(resolve_model(str(tmp_path / "m"), random_weights=True).config) == anatomy, "as plan asks"


def test_a_head_that_the_config_says_is_its_own_must_be_there(refusal: Callable[..., ModelError]) -> None:
    error = refusal(lambda tensors: removed(tensors, "lm_head.weight"), "t5_own_head")
    assert "lacks 1 tensor of T5ForConditionalGeneration: lm_head.weight" in error.message


@pytest.mark.parametrize("pickled", [False, True])
def test_a_dtype_that_the_config_does_not_name_is_the_files(pickled: bool, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "llama", dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for random_weights in (False, True):
        source = resolve_model(str(folder), random_weights=random_weights)
        assert pick_dtype("auto", source, "cuda") == "bfloat16"
        assert read_anatomy(source.config).dtype == "bfloat16"


def test_of_a_model_of_the_hub_headers_say_it_before_its_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fields = {"model_type": "llama", "vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**fields)
    assert config.dtype is None
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", lambda *args, **named: (fields, {}))
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **named: config)
    asked: list[Any] = []

    def metadata(name: str, revision: str | None) -> Any:
        asked.append((name, revision))
        return SimpleNamespace(parameter_count={"BF16": 1000, "F32": 10, "I64": 5000})

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    source = resolve_model("who/what", revision="v1")
    assert asked == [("who/what", "v1")]
    assert (source.facts, pick_dtype("auto", source, "cuda")) == (None, "bfloat16")


def test_weights_that_come_after_the_plan_are_accounted_for_before_they_load(
    small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = rewritten(small_checkpoint("llama_tied"), tmp_path / "m", lambda tensors: None)
    source = replace(resolve_model(str(folder)), facts=None)
    control = Control(World(), "cpu")

    def load() -> None:
        load_engine(plan_of(source), source, None, control, torch.device("cpu"), SilentListener()).close()

    load()
    tensors = load_file(folder / "model.safetensors")
    own_head = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous()}
    save_file(own_head, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"stores lm_head\.weight otherwise than its config says") as caught:
        load()
    assert "run the same command again" in str(caught.value.hint)
    del tensors[DOWN]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 tensor of LlamaForCausalLM: {DOWN}"):
        load()


def plan_of(source: ModelSource) -> Plan:
    anatomy = read_anatomy(source.config, dtype="float32")
    return Plan(
        anatomy=anatomy, engine="resident", dtype="float32", device="cpu", batch_size=1, offload="none", world_size=1
    )


def test_tensors_that_are_not_used_are_told_of(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)

    class Notes(SilentListener):
        texts: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.texts.append(text)

    source = resolve_model(str(rewritten(small_checkpoint("llama"), tmp_path / "m", add)))
    load_engine(plan_of(source), source, None, Control(World(), "cpu"), torch.device("cpu"), Notes()).close()
    said = "the model does not use 1 stored tensors: model.layers.0.self_attn.q_proj.bias"
    assert Notes.texts == [said]


def test_a_dtype_that_the_config_names_stays(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "llama", dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    source = resolve_model(str(folder))
    assert pick_dtype("auto", source, "cuda") == "float32"
    assert read_facts("m", source.config, local_weight_files(folder)).dtype == "bfloat16"
