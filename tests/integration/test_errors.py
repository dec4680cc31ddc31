"""Mistakes of the user and lacks of the machine are found before weights are loaded, each with its words and code."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import read_jsonl, run_zeroinf, write_jsonl

from zeroinf.cli.main import cli
from zeroinf.errors import ZeroinfError


@pytest.fixture(scope="session")
def model(small_checkpoint: Callable[[str], Path]) -> str:
    return str(small_checkpoint("gpt_neox"))


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`fails(arguments)`: exit code, message and hint of `zeroinf run`, in this process, loading no weights."""

    def no_engine(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are being loaded")

    def run(*arguments: str) -> tuple[int, str, str]:
        import zeroinf.service.loaded

        monkeypatch.setattr(zeroinf.service.loaded, "load_engine", no_engine)
        monkeypatch.setattr(sys, "argv", ["zeroinf", "run", *arguments])
        with pytest.raises(ZeroinfError) as caught:
            cli.main(args=["run", *arguments], standalone_mode=False)
        assert "loading weights" not in capfd.readouterr().err
        return caught.value.exit_code, caught.value.message, caught.value.hint or ""

    return run


PROMPT = ("--prompt", "Hello")


def test_unknown_model_on_the_hub(fails: Any) -> None:
    code, message, hint = fails("-m", "nobody/no-such-model", *PROMPT)
    assert code == 2
    assert "nobody/no-such-model" in message
    assert "folder" in hint


def test_unknown_model_folder(fails: Any, tmp_path: Path) -> None:
    code, message, _ = fails("-m", str(tmp_path / "absent"), *PROMPT)
    assert code == 2
    assert f"no such folder: '{tmp_path / 'absent'}'" in message


def test_model_without_weights(fails: Any, model: str, tmp_path: Path) -> None:
    shutil.copy(Path(model) / "config.json", tmp_path)
    code, message, _ = fails("-m", str(tmp_path), *PROMPT)
    assert code == 2
    assert "holds no weights" in message


def test_model_without_tokenizer(fails: Any, model: str, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(Path(model) / file, tmp_path)
    code, message, hint = fails("-m", str(tmp_path), *PROMPT)
    assert code == 2
    assert f"no tokenizer for {tmp_path}" in message
    assert "tokenizer.json" in hint


def test_offload_path_that_is_missing(fails: Any, model: str, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    code, message, hint = fails("-m", model, *PROMPT, "--offload", "nvme", "--nvme-path", str(absent))
    assert code == 2
    assert f"--nvme-path {absent} is not a folder" in message
    assert f"mkdir -p {absent}" in hint


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_offload_path_that_is_not_writable(fails: Any, model: str) -> None:
    # Not even root makes files there.
    code, message, _ = fails("-m", model, *PROMPT, "--offload", "nvme", "--nvme-path", "/proc/self/fd")
    assert code == 2
    assert "--nvme-path /proc/self/fd is not writable" in message


@pytest.mark.parametrize("engine", [(), ("--engine", "zero")])
def test_offload_path_too_small_for_the_weights(
    engine: Sequence[str], fails: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, message, hint = fails("-m", model, *PROMPT, "--offload", "nvme", "--nvme-path", str(tmp_path), *engine)
    assert code == 3
    assert f"{tmp_path} has 97.7 KiB free" in message
    assert "--offload cpu" in hint


def test_memlock_limit_below_the_pool_that_deepspeed_locks(
    fails: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from zeroinf.hardware.snapshot import read_memory

    memory = replace(read_memory(), memlock_bytes=64)
    monkeypatch.setattr("zeroinf.hardware.snapshot.read_memory", lambda: memory)
    nvme = ("--engine", "zero", "--offload", "nvme", "--nvme-path", str(tmp_path))
    code, message, hint = fails("-m", model, *PROMPT, *nvme)
    assert code == 4
    assert "memlock" in message
    assert "ulimit -l unlimited" in hint


@pytest.mark.parametrize("engine", [(), ("--engine", "zero")])
def test_host_memory_too_small_for_what_was_asked(engine: Sequence[str], fails: Any, model: str) -> None:
    code, message, hint = fails("-m", model, *PROMPT, "--host-memory", "512MiB", *engine)
    assert code == 3
    assert "nothing fits, host memory is short: " in message
    assert "GiB of host memory, 0.50 GiB are there" in message
    assert "GiB more host memory: " in hint


def test_nvme_without_a_path(fails: Any, model: str) -> None:
    code, message, _ = fails("-m", model, *PROMPT, "--offload", "nvme")
    assert (code, message) == (2, "--offload nvme needs --nvme-path")


@pytest.mark.parametrize("content", ["", "\n  \n\n"])
def test_empty_input(content: str, fails: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(content)
    code, message, _ = fails("-m", model, "-i", str(tmp_path / "empty.txt"))
    assert code == 2
    assert f"empty input: {tmp_path / 'empty.txt'} holds no request" in message


def test_no_input_at_all(fails: Any, model: str) -> None:
    assert fails("-m", model)[:2] == (2, "no input")


def test_input_file_that_is_missing(fails: Any, model: str, tmp_path: Path) -> None:
    code, message, _ = fails("-m", model, "-i", str(tmp_path / "absent.txt"))
    assert (code, message) == (2, f"no such input file: {tmp_path / 'absent.txt'}")


@pytest.mark.parametrize("flag", ["-i", "--zero-config"])
def test_a_pipe_in_the_place_of_a_file(flag: str, fails: Any, model: str, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    code, message, _ = fails("-m", model, *(PROMPT if flag != "-i" else ()), flag, str(pipe))
    assert (code, message) == (2, f"{flag} {pipe} is no regular file")


def test_only_malformed_lines(fails: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": \n{"no": 1}\n')
    code, message, _ = fails("-m", model, "-i", str(tmp_path / "in.jsonl"))
    assert code == 2
    assert "none of the 2 requests can be run: not JSON" in message


def test_with_an_output_file_a_job_of_bad_lines_ends_like_any_other(fails: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": \n{"id": "b"}\n')
    out = tmp_path / "out.jsonl"
    arguments = ("-m", model, "-i", str(tmp_path / "in.jsonl"), "-o", str(out))
    for more in ((), ("--resume",)):
        assert fails(*arguments, *more)[:2] == (
            5,
            "none of the 2 requests can be run: not JSON: Expecting value at column 12",
        )
        assert out.read_text() == ""
        errors = [json.loads(line) for line in Path(f"{out}.errors.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [(error["line"], error["id"]) for error in errors] == [(1, None), (2, "b")]
    assert fails(*arguments)[:2] == (2, f"{out} exists already")


def test_only_prompts_longer_than_the_context(fails: Any, model: str) -> None:
    code, message, _ = fails("-m", model, "--prompt", "x" * 250, "--max-new-tokens", "10")
    assert code == 2
    assert "the prompt has 250 tokens and max_new_tokens is 10, but the model's context holds 256" in message


@pytest.mark.parametrize("existing", ["out.jsonl", "out.jsonl.partial", "out.jsonl.errors.jsonl"])
def test_output_that_exists(existing: str, fails: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / existing).write_text("precious\n")
    code, message, hint = fails("-m", model, *PROMPT, "-o", str(tmp_path / "out.jsonl"))
    assert code == 2
    assert f"{tmp_path / existing} exists already" in message
    assert "--overwrite" in hint
    assert (tmp_path / existing).read_text() == "precious\n"


def test_output_in_a_folder_that_is_missing(fails: Any, model: str, tmp_path: Path) -> None:
    code, message, _ = fails("-m", model, *PROMPT, "-o", str(tmp_path / "absent" / "out.jsonl"))
    assert code == 2
    assert "does not exist" in message


def test_a_report_that_could_not_be_written(fails: Any, model: str, tmp_path: Path) -> None:
    code, message, _ = fails("-m", model, *PROMPT, "--report", str(tmp_path / "absent" / "report.json"))
    assert code == 2
    assert "its folder does not exist or is not writable" in message


def test_float16_on_the_cpu(fails: Any, model: str) -> None:
    assert fails("-m", model, *PROMPT, "--dtype", "float16")[:2] == (2, "float16 does not run on the CPU")


def test_fewer_gpus_than_asked_for(fails: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    code, message, hint = fails("-m", model, *PROMPT, "--num-gpus", "2")
    assert (code, message) == (4, "--num-gpus 2, but this machine shows 0")
    assert "DS_ACCELERATOR=cpu" in hint


def test_output_is_checked_before_ranks_are_started(fails: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious\n")
    code, message, _ = fails("-m", model, *PROMPT, "--num-gpus", "2", "-o", str(tmp_path / "out.jsonl"))
    assert code == 2
    assert "exists already" in message


def test_another_number_of_gpus_than_the_launcher_started(
    fails: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    code, message, _ = fails("-m", model, *PROMPT, "--num-gpus", "2")
    assert (code, message) == (2, "--num-gpus 2 inside a launcher that started 4 ranks on this node")


def test_half_a_launchers_environment(fails: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    code, message, _ = fails("-m", model, *PROMPT)
    assert code == 4
    assert "RANK set, but not WORLD_SIZE" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--overwrite"], "--overwrite without --output-file"),
        (["--resume"], "--resume without --output-file"),
        (["--resume-anyway", "-o", "o", "--overwrite"], "--resume-anyway and --overwrite contradict each other"),
        (["--hostfile", "ZERO"], "--hostfile without --output-file"),
        (["--seed", "1"], "--seed has no effect"),
        (["--top-p", "0.5", "--top-k", "3"], "--top-p, --top-k has no effect"),
        (["--offload", "cpu", "--nvme-path", "/tmp"], "--nvme-path has no effect with --offload cpu"),
        (["--offload", "cpu", "--aio-threads", "4"], "--aio-threads has no effect with --offload cpu"),
        (
            ["--offload", "nvme", "--nvme-path", ".", "--aio-threads", "4"],
            "no effect with the stream engine",
        ),
        (["--offload", "nvme", "--nvme-path", ".", "--nvme-path", "./"], "names the same folder twice"),
        (["--engine", "zero", "--offload", "nvme", "--nvme-path", ".", "--nvme-path", "/"], "one --nvme-path"),
        (["--engine", "zero", "--aio-threads", "4"], "--aio-threads has no effect without --nvme-path"),
        (["--offload", "none", "--no-pin-memory"], "no effect with --offload none"),
        (["--no-pin-memory"], "--no-pin-memory has no effect: this run computes on the CPU"),
        (["--gpu-memory", "8GiB"], "--gpu-memory has no effect: this run computes on the CPU"),
        (["--resident-blocks", "4"], "--resident-blocks 4, but the model has 3 layers"),
        (["--offload", "none", "--resident-blocks", "1"], "--resident-blocks has no effect with --offload none"),
        (["--engine", "zero", "--resident-blocks", "1"], "--resident-blocks has no effect with the zero engine"),
        (["--fetch", "replicated"], "--fetch replicated has no effect with one rank"),
        (["--input-format", "text"], "--input-format without --input-file"),
        (["--keep-columns", "a"], "--keep-columns without --output-file"),
        (["--output-format", "csv"], "--output-format without --output-file"),
        (["-o", "-", "--output-format", "csv"], "--output-format csv with -o -"),
        (["-o", "-", "--resume"], "--resume with -o -"),
        (["--min-tokens", "9", "--max-new-tokens", "8"], "--min-tokens is above --max-new-tokens"),
        (["--template", "{{ x }}", "--prompt-column", "y"], "--template and --prompt-column contradict each other"),
        (["--engine", "tensor-parallel", "--kernel-inject"], "BLOOM's and GPT-NeoX's cannot be made"),
        (["--engine", "tensor-parallel", "--dtype", "int8"], "init_inference refuses the dtype"),
        (["--zero-config", "ZERO", "--offload", "cpu"], "offload and --zero-config contradict each other"),
        (["--zero-config", "ZERO", "--pin-memory"], "pin-memory and --zero-config contradict each other"),
        (["--zero-config", "ZERO", "--nvme-path", "."], "--nvme-path and --zero-config contradict each other"),
        (["--zero-config", "ZERO", "--aio-threads", "4"], "--aio-threads and --zero-config contradict each other"),
        (["--zero-config", "ZERO", "--resident-blocks", "1"], "--resident-blocks has no effect with the zero engine"),
        (["--zero-config", "ZERO", "--fetch", "replicated"], "--fetch has no effect with the zero engine"),
        (["--zero-config", "ZERO", "--engine", "stream"], "--engine stream: --zero-config configures DeepSpeed"),
    ],
)
def test_settings_that_would_have_no_effect_or_contradict_each_other_are_refused_by_name(
    arguments: Sequence[str], words: str, fails: Any, model: str, tmp_path: Path
) -> None:
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}))
    given = [str(zero) if argument == "ZERO" else argument for argument in arguments]
    code, message, hint = fails("-m", model, *PROMPT, *given)
    assert code == 2
    assert words in message
    assert hint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "--zero-config"),
        ("[1]", "holds no JSON object"),
        ('{"zero_optimization": {"stage": 2}}', "only stage 3"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "no nvme_path"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "moon"}}}', "'moon'"),
    ],
)
def test_a_zero_config_that_cannot_work(content: str, words: str, fails: Any, model: str, tmp_path: Path) -> None:
    zero = tmp_path / "zero.json"
    zero.write_text(content)
    code, message, _ = fails("-m", model, *PROMPT, "--zero-config", str(zero))
    assert code == 2
    assert words in message


def test_refused_lines_do_not_keep_the_others_from_being_done(model: str, tmp_path: Path) -> None:
    entries = [
        {"id": "good", "prompt": "Hello"},
        {"id": "bad", "prompt": "Hello", "temperature": -1},
        {"id": "long", "prompt": "x" * 300},
        {"id": "sampled", "prompt": "Hi", "temperature": 0.8, "seed": 5, "max_new_tokens": 3},
        {"id": "chat", "messages": [{"role": "user", "content": "Hi"}]},
        {"id": "last", "prompt": "Bye", "max_new_tokens": 2},
    ]
    requests, out = write_jsonl(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl"
    done = run_zeroinf(["-m", model, "-i", str(requests), "-o", str(out), "--max-new-tokens", "4", "--ignore-eos"])
    assert done.code == 5, done.err
    assert done.out == ""
    found = read_jsonl(out)
    assert [(line["id"], line["completion_tokens"]) for line in found] == [("good", 4), ("sampled", 3), ("last", 2)]
    assert all(
        set(line) == {"id", "completion", "finish_reason", "prompt_tokens", "completion_tokens"} for line in found
    )
    refused = read_jsonl(tmp_path / "out.jsonl.errors.jsonl")
    assert [(line["line"], line["id"]) for line in refused] == [(2, "bad"), (3, "long"), (5, "chat")]
    assert "context holds 256" in refused[1]["error"]
    assert "no chat template" in refused[2]["error"]
    for number in (2, 3, 5):
        assert f"refused: line {number}: " in done.err
    assert "error: 3 of 6 requests were refused" in done.err
    assert f"see {out}.errors.jsonl" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--dtype", "float16"], 2, "float16 does not run on the CPU"),
        (["--host-memory", "512MiB"], 3, "nothing fits, host memory is short: "),
    ],
)
def test_every_rank_ends_with_the_code_of_the_error_and_one_speaks(
    arguments: Sequence[str], code: int, words: str, model: str
) -> None:
    done = run_zeroinf(["-m", model, *PROMPT, *arguments], ranks=2, launcher="num-gpus")
    assert done.code == code, done.err
    assert done.err.count(words) == 1
    assert "Traceback" not in done.err
    assert "loading weights" not in done.err
