"""Every name a user may give resolves to a model or to an error that says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file
from small_models import EOS, PAD, make_checkpoint
from transformers import AutoModelForCausalLM, PretrainedConfig

from zeroinf.errors import ModelError, UsageError
from zeroinf.model.resolve import resolve_model
from zeroinf.model.source import ModelSource, pick_dtype
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.model.weights import weight_files


@pytest.fixture
def checkpoint(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a small checkpoint that a test may damage."""
    return Path(shutil.copytree(small_checkpoint("llama"), tmp_path / "llama"))


def write_config(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def source_with(dtype: str | None) -> ModelSource:
    return ModelSource(
        name="m",
        location="m",
        revision=None,
        trust_remote_code=False,
        random_weights=False,
        config=PretrainedConfig(dtype=dtype),
    )


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, zeroinf.model.source, zeroinf.model.weights; print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_checkpoint_folder(checkpoint: Path) -> None:
    source = resolve_model(str(checkpoint))
    assert source.location == str(checkpoint)
    assert source.config.model_type == "llama"
    assert [file.name for file in weight_files(source)] == ["model.safetensors"]
    assert source == resolve_model(str(checkpoint)), "the config takes no part in equality"


def test_a_sharded_checkpoint(checkpoint: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size="100KB")
    (checkpoint / "model.safetensors").unlink()
    files = weight_files(resolve_model(str(checkpoint)))
    assert len(files) > 1
    assert all(file.is_file() for file in files)
    files[1].unlink()
    with pytest.raises(ModelError, match=f"lacks {files[1].name}"):
        resolve_model(str(checkpoint))


def test_torch_weights_are_accepted(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert [file.name for file in weight_files(resolve_model(str(checkpoint)))] == ["pytorch_model.bin"]


def test_a_folder_without_weights_needs_random_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        resolve_model(str(checkpoint))
    assert resolve_model(str(checkpoint), random_weights=True).random_weights


def test_a_damaged_index_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json is not an index"):
        resolve_model(str(checkpoint))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "/nothing/here", "~/nothing-here", "a/b/c", "x.gguf", ""])
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model(name)


def test_a_hub_id_that_a_shell_would_interpret_is_only_a_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model .* on the hub"):
        resolve_model(f"$(touch${{IFS}}it-ran)/`touch {tmp_path.name}`")
    assert not Path("it-ran").exists()


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(file))


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", model_type="no-such-type")
    with pytest.raises(ModelError, match=r"cannot be read.*no-such-type"):
        resolve_model(str(folder), random_weights=True)
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match="cannot be read"):
        resolve_model(str(folder), random_weights=True)


@pytest.mark.parametrize("method", ["quanto", "aqlm", "higgs"])
def test_weights_in_a_format_of_their_own_are_refused_by_name(method: str, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    for random_weights in (False, True):
        with pytest.raises(ModelError, match=f"quantized already, with {method}, which does not stream: "):
            resolve_model(str(checkpoint), random_weights=random_weights)


def test_code_of_the_models_own_is_named_and_not_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "some/where--modeling_odd.Model"}
    folder = write_config(tmp_path / "m", model_type="odd", auto_map=auto_map)
    (folder / "configuration_odd.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(
        ModelError, match=r"would run here: configuration_odd\.py, modeling_odd\.py of some/where$"
    ) as caught:
        resolve_model(str(folder), random_weights=True)
    assert "--trust-remote-code" in str(caught.value.hint)


def test_code_of_the_tokenizers_own_is_named_and_not_run(checkpoint: Path) -> None:
    known = json.loads((checkpoint / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["tokens_odd.Odd", None]}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**known, **own}))
    (checkpoint / "tokens_odd.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ModelError, match=r"would run here: tokens_odd\.py$") as caught:
        load_tokenizer(resolve_model(str(checkpoint)))
    assert "--trust-remote-code" in str(caught.value.hint)


def test_code_that_transformers_has_itself_is_not_needed(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_odd.OddModel"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert resolve_model(str(checkpoint)).config.model_type == "llama"


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("t5", "T5EncoderModel"), ("bert", "BertForMaskedLM"), ("bart", "BartModel"), ("vit", "ViTModel")],
)
def test_what_does_not_generate_text_is_named(model_type: str, architecture: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", model_type=model_type, architectures=[architecture])
    with pytest.raises(ModelError, match=f"no language model that generates: {architecture}"):
        resolve_model(str(folder), random_weights=True)


@pytest.mark.parametrize("name", ["pythia-160m", "EleutherAI/pythia-160m", "LLAMA-2-13B"])
def test_a_catalog_name_with_random_weights(name: str) -> None:
    source = resolve_model(name, random_weights=True)
    assert "/" in source.location
    assert load_tokenizer(source) is None


def test_a_catalog_name_without_random_weights_points_to_the_checkpoint() -> None:
    with pytest.raises(ModelError, match="shape in the catalog") as caught:
        resolve_model("llama-2-13b")
    assert "meta-llama/Llama-2-13b-hf" in str(caught.value.hint)


def test_a_hub_id_without_network() -> None:
    with pytest.raises(ModelError, match="hub cannot be reached") as caught:
        resolve_model("nobody/nothing")
    assert "local folder" in str(caught.value.hint)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("cause", "message", "hint"),
    [
        (errors.GatedRepoError, "is gated", "hf auth login"),
        (errors.RepositoryNotFoundError, "no model nobody/nothing", "check the spelling"),
        (errors.RevisionNotFoundError, "no revision 'v9'", "--revision"),
        (errors.LocalEntryNotFoundError, "cannot be reached", "HF_HUB_OFFLINE"),
        (RuntimeError, "cannot be read: it failed", "local folder"),
    ],
)
def test_what_the_hub_answers(cause: type[Exception], message: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        http = {"response": MagicMock()} if issubclass(cause, errors.HfHubHTTPError) else {}
        raise OSError("it failed\nat length") from cause("why", **http)

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", refuse)
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model("nobody/nothing", revision="v9")
    assert hint in str(caught.value.hint)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_only_the_files_that_are_needed_are_fetched(
    has_safetensors: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []
    if not has_safetensors:
        (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")

    def snapshot(_: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = resolve_model("pythia-160m", random_weights=True)
    assert weight_files(source)[0].is_file()
    assert ("pytorch_model*.bin" in asked) is not has_safetensors
    assert not any(pattern in ("*", "*.safetensors") for pattern in asked)


def test_weights_that_cannot_be_fetched() -> None:
    with pytest.raises(ModelError, match="cannot be reached"):
        weight_files(resolve_model("pythia-160m", random_weights=True))


def test_tokenizer_pads_on_the_left(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(str(checkpoint)))
    assert tokenizer is not None
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == ("left", PAD)
    assert tokenizer.decode(tokenizer("naïve text").input_ids) == "naïve text"


@pytest.mark.parametrize(("dropped", "pad"), [(("pad_token",), EOS), (("pad_token", "eos_token"), 1)])
def test_a_missing_pad_token_is_replaced(dropped: tuple[str, ...], pad: int, checkpoint: Path) -> None:
    file = checkpoint / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(file.read_text()).items() if key not in dropped}
    file.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(resolve_model(str(checkpoint)))
    assert tokenizer is not None
    assert tokenizer.pad_token_id == pad


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "m", with_tokenizer=False)
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(resolve_model(str(folder)))
    assert load_tokenizer(resolve_model(str(folder), random_weights=True)) is None


def test_a_tokenizer_that_cannot_be_read(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(resolve_model(str(checkpoint)))


@pytest.mark.parametrize(
    ("requested", "own", "device", "supports_bf16", "picked"),
    [
        ("auto", "bfloat16", "cuda", True, "bfloat16"),
        ("auto", "float16", "cuda", True, "float16"),
        ("auto", "float16", "cpu", True, "bfloat16"),
        ("auto", None, "cuda", True, "float32"),
        ("auto", "bfloat16", "cuda", False, "float16"),
        ("auto", "float16", "cpu", False, "float32"),
        ("float32", "bfloat16", "cpu", True, "float32"),
        ("float16", "float32", "cuda", True, "float16"),
    ],
)
def test_dtype(requested: str, own: str | None, device: str, supports_bf16: bool, picked: str) -> None:
    assert pick_dtype(requested, source_with(own), device, supports_bf16) == picked


@pytest.mark.parametrize(
    ("requested", "device", "supports_bf16"),
    [("float16", "cpu", True), ("bfloat16", "cuda", False), ("int8", "cpu", True)],
)
def test_a_dtype_that_does_not_run_is_refused(requested: str, device: str, supports_bf16: bool) -> None:
    with pytest.raises(UsageError, match=requested):
        pick_dtype(requested, source_with("float32"), device, supports_bf16)


def test_a_revision_of_what_does_not_come_from_the_hub_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "llama")
    with pytest.raises(UsageError, match=r"--revision v1 has no effect: .* comes from a local folder"):
        resolve_model(str(folder), revision="v1")
