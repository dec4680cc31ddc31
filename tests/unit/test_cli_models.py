"""Models that are here are listed, others are fetched from the hub, and shells complete their names."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_hub import COMMIT, Hub, fake_hub

_PROGRAM = """
import io, json, shutil, sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from zeroinf.cli.main import main
said, disk_usage = [], shutil.disk_usage
for sys.argv[1:], free in json.loads(sys.argv[1]):
    shutil.disk_usage = disk_usage if free is None else lambda path: SimpleNamespace(free=free)
    with redirect_stderr(io.StringIO()) as stderr, redirect_stdout(io.StringIO()) as stdout:
        try:
            main()
        except SystemExit as end:
            code = end.code
    said.append((code, stdout.getvalue(), stderr.getvalue()))
print(json.dumps([said, [name for name in ("torch", "transformers") if name in sys.modules]]))
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Machine:
    """A home folder, and commands that run there, side by side in one process."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "PATH": "/usr/bin:/bin"}
        self.environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_DISABLE_XET": "1"}

    def run(self, *commands: Sequence[str] | tuple[Sequence[str], int]) -> list[Said]:
        each = [one if isinstance(one[-1], int) else (one, None) for one in commands]
        words = [sys.executable, "-c", _PROGRAM, json.dumps(each)]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said, loaded = json.loads(done.stdout)
        assert not loaded
        return [Said(*one) for one in said]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    model = tmp_path / "model"
    model.mkdir()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    files = {
        "config.json": json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}),
        "model.safetensors.index.json": json.dumps(index),
        "model-1.safetensors": "x" * 300_000,
        "model-2.safetensors": "y" * 300_000,
        "tokenizer.json": "{}",
        **dict.fromkeys(("pytorch_model.bin", "model.gguf", "model.onnx", "code.py", "picture.png"), "not needed"),
    }
    for name, text in files.items():
        (model / name).write_text(text)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (pickled / name).write_text("{}")
    with fake_hub({"org/model": model, "org/pickled": pickled}) as hub:
        yield Machine(hub, tmp_path / "home")


def test_a_download_fetches_what_a_run_needs_and_goes_on_where_it_stopped(machine: Machine) -> None:
    machine.hub.broken = {"model-2.safetensors"}
    fetch = ["download", "org/model"]
    dry, small, stopped, listed = machine.run([*fetch, "--dry-run"], (fetch, 1000), fetch, ["models", "--local", "org"])
    assert (dry.code, "org/model: 5 files, 0.6 MiB, to " in dry.out) == (0, True)
    assert small.code == 3
    assert "error: org/model needs 0.6 MiB more below" in small.err
    assert "hint: set HF_HOME to a folder on a larger disk" in small.err
    assert (stopped.code, stopped.out) == (2, "")
    assert "error: fetching org/model stopped: " in stopped.err
    assert "hint: the same command goes on with the files that it lacks" in stopped.err
    assert "incomplete: zeroinf download org/model goes on" in listed.out
    machine.hub.broken = set()
    before = len(machine.hub.asked)
    whole, again, listed, as_json = machine.run(
        fetch, [*fetch, "-q"], ["models", "--local", "org"], ["models", "--json", "MODEL"]
    )
    assert whole.code == again.code == 0
    assert whole.out == again.out == f"{machine.home}/hub/models--org--model/snapshots/{COMMIT}\n"
    assert "org/model: 5 files, 0.6 MiB, 0.3 MiB of it here\n" in whole.err
    assert "0.3 MiB of 0.3 MiB, " in whole.err
    fetched = [
        path.rpartition("/")[2] for method, path in machine.hub.asked[before:] if method == "GET" and COMMIT in path
    ]
    assert [name for name in fetched if name != COMMIT] == ["model-2.safetensors"]
    assert again.err == ""
    held = {file.name for file in Path(whole.out.strip()).iterdir()}
    assert held == {"config.json", "tokenizer.json", "model.safetensors.index.json"} | {
        f"model-{number}.safetensors" for number in (1, 2)
    }
    assert [line.split() for line in listed.out.splitlines()[1:]] == [
        ["model", "size", "quantized"],
        ["org/model", "0.6", "MiB", "awq"],
    ]
    (found,) = json.loads(as_json.out)["local"]
    assert (found["name"], found["quantized"], found["state"]) == ("org/model", "awq", "whole")
    assert found["bytes"] > 600_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_download_that_is_stopped_ends_at_once_and_leaves_no_parts_of_files(number: int, machine: Machine) -> None:
    machine.hub.slow = {"model-2.safetensors"}
    blobs, whole_but_one = machine.home / "hub" / "models--org--model" / "blobs", ["", "", "", "", ".incomplete"]
    words = [sys.executable, "-m", "zeroinf", "download", "org/model"]
    with subprocess.Popen(words, env=machine.environment, stderr=subprocess.PIPE, text=True) as process:
        while [file.suffix for file in sorted(blobs.glob("*"), key=lambda file: file.suffix)] != whole_but_one:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.endswith(
        f"error: stopped by {signal.Signals(number).name}\n\n"
        "hint: files that are whole stay; the same command fetches the others\n"
    )
    assert not list(blobs.glob("*.incomplete"))


def test_a_download_without_safetensors_takes_pickles_and_what_is_no_model_is_refused(machine: Machine) -> None:
    pickled, absent, demo, here, catalog = machine.run(
        ["download", "org/pickled", "-q"],
        ["download", "org/absent"],
        ["download", "demo"],
        ["download", str(machine.home.parent)],
        ["download", "llama-2-7b"],
    )
    assert {file.name for file in Path(pickled.out.strip()).iterdir()} == {"config.json", "pytorch_model.bin"}
    assert [one.code for one in (absent, demo, here, catalog)] == [2, 2, 2, 2]
    assert "no model org/absent on the hub" in absent.err
    assert "demo comes with a package" in demo.err
    assert "is on this machine already" in here.err
    assert "no model meta-llama/Llama-2-7b-hf on the hub" in catalog.err


def test_models_lists_the_catalog(machine: Machine) -> None:
    listed, as_json, none = machine.run(["models", "llama-2-70b"], ["models", "--json"], ["models", "nothing-like-it"])
    assert ["llama-2-70b", "69", "billion", "-", "meta-llama/Llama-2-70b-hf"] in [
        line.split() for line in listed.out.splitlines()
    ]
    found: dict[str, Any] = json.loads(as_json.out)
    assert found["schema"] == 1
    assert {one["name"]: one["parameters"] for one in found["catalog"]}["llama-2-70b"] == 68_976_648_192
    assert none.out.count("  none\n") == 2


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("zeroinf down", ["download"]),
        ("zeroinf run --dty", ["--dtype"]),
        ("zeroinf run --dtype bf", ["bfloat16"]),
        ("zeroinf plan llama-2-70b-", ["llama-2-70b-awq"]),
    ],
)
def test_a_shell_completes_commands_options_choices_and_models(
    machine: Machine, words: str, completed: list[str]
) -> None:
    asking = {"_ZEROINF_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "zeroinf"], env=machine.environment | asking, capture_output=True, text=True
    )
    assert done.stdout.split() == [f"plain,{one}" for one in completed]


def test_a_shell_reads_what_completion_prints(machine: Machine) -> None:
    bash, zsh, fish = machine.run(*(["completion", shell] for shell in ("bash", "zsh", "fish")))
    assert "_ZEROINF_COMPLETE=bash_complete" in bash.out
    assert "#compdef zeroinf" in zsh.out
    assert "complete --no-files --command zeroinf" in fish.out
    assert subprocess.run(["bash", "-n"], input=bash.out, text=True).returncode == 0
