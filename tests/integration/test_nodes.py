"""Two nodes, played by one machine: the launchers' ways to several, and a rank that dies on one of them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import Finished, has_results, read_jsonl, run_zeroinf, wait_until, write_jsonl

from zeroinf.cli.ranks import packed, unpacked
from zeroinf.distributed.ports import free_port

# What pdsh does with its last arguments on each host, without the host.
PDSH = """#!/bin/sh
while [ "$1" != -w ]; do shift; done
shift 2
node=0
for host in one two; do
    sh -c "$(printf '%s ' "$@" | sed "s/%n/$node/g")" &
    pids="$pids $!"
    node=$((node + 1))
done
code=0
for pid in $pids; do wait $pid || code=$?; done
exit $code
"""
SSH = "#!/bin/sh\necho 127.0.0.1\n"


@pytest.fixture(scope="session")
def model(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


def requests(tmp_path: Path, count: int, tokens: int = 6) -> Path:
    entries = [
        {"id": f"r{i}", "prompt": f"word {i:05}", "max_new_tokens": 1 + i % tokens, "ignore_eos": True}
        for i in range(count)
    ]
    return write_jsonl(tmp_path / "in.jsonl", entries)


def arguments(model: Path, prompts: Path, out: Path) -> list[str]:
    return ["-m", str(model), "-i", str(prompts), "-o", str(out), "-b", "2", "--offload", "cpu"]


@pytest.mark.full
def test_a_hostfile_starts_ranks_on_all_its_nodes_and_no_shell_reads_a_prompt(model: Path, tmp_path: Path) -> None:
    hosts, tools, out = tmp_path / "hosts", tmp_path / "bin", tmp_path / "out.jsonl"
    hosts.write_text("one slots=1\ntwo slots=1\n")
    tools.mkdir()
    for name, script in (("pdsh", PDSH), ("ssh", SSH)):
        (tools / name).write_text(script)
        (tools / name).chmod(stat.S_IRWXU)
    trapped = tmp_path / "t"
    trap = f"$(touch {trapped}) \"; touch {trapped} ' \\"
    done = run_zeroinf(
        [
            *arguments(model, requests(tmp_path, 12), out),
            "--prompt",
            trap,
            "--max-new-tokens",
            "3",
            "--hostfile",
            str(hosts),
        ],
        env={"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.code == 0, done.err
    assert "on each of 2 streams" in done.err
    assert [line["id"] for line in read_jsonl(out)] == ["request-1", *(f"r{i}" for i in range(12))]
    assert not trapped.exists()


def test_a_word_for_another_node_holds_nothing_that_a_shell_would_read_and_no_secret() -> None:
    arguments = ["run", "--prompt", "$(rm -rf /) `id` \"'\\ ü", "-o", "a b"]
    word = packed(arguments, {"ZEROINF_RUN_SEED": "1", "HF_TOKEN": "secret", "PATH": "/bin"})
    assert all(letter.isalnum() or letter in "-_=" for letter in word)
    assert unpacked(word) == (arguments, {"ZEROINF_RUN_SEED": "1"})


def test_a_job_on_two_nodes_of_torchrun_ends_with_a_killed_rank_and_goes_on_on_one(model: Path, tmp_path: Path) -> None:
    prompts, out, port = requests(tmp_path, 800, tokens=16), tmp_path / "out.jsonl", str(free_port())

    def node(rank: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                str(Path(sys.executable).with_name("torchrun")),
                *("--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"),
                *("--master-addr", "127.0.0.1", "--master-port", port),
                *("-m", "zeroinf", "run", *arguments(model, prompts, out)),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )

    nodes = [node(0), node(1)]
    try:
        wait_until(lambda: has_results(out, 4), nodes[0])
        (victim,) = [p for p in psutil.Process(nodes[1].pid).children() if "zeroinf" in " ".join(p.cmdline())]
        victim.send_signal(signal.SIGKILL)
        said = [process.communicate(timeout=60)[1] for process in nodes]
    finally:
        for process in nodes:
            process.kill()
    assert [process.returncode for process in nodes] == [1, 1]
    assert f"rank 1 (process {victim.pid}) died" in said[0]
    assert "to go on: zeroinf run " in said[0]
    assert not out.exists()
    done: Finished = run_zeroinf([*arguments(model, prompts, out), "--resume"])
    assert done.code == 0, done.err
    assert "resuming with" in done.err
    assert [line["id"] for line in read_jsonl(out)] == [f"r{i}" for i in range(800)]
