"""Jobs from files of every kind to results, in this process, through the stream engine on the CPU."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from launching import read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from zeroinf.cli.main import cli
from zeroinf.distributed.world import World
from zeroinf.errors import OutputError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.shape import EntryShape
from zeroinf.options.options import RunOptions
from zeroinf.runs.runner import run_job
from zeroinf.sizes import DEFAULT_NEW_TOKENS


class Deaf:
    """An observer that hears nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *heard: None


def run(model: Path, requests: Path | str, output: Path, **options: Any) -> Any:
    asked = {"sampling": Sampling(max_new_tokens=4), "offload": "cpu", "dtype": "float32", **options}
    asked |= {"model": str(model), "input_files": (str(requests),), "output_file": output}
    return run_job(RunOptions(**asked), World(), torch.device("cpu"), sys.stdout, Deaf())


def command_line(words: list[str]) -> Result:
    return CliRunner().invoke(cli, words, prog_name="zeroinf", standalone_mode=False)


@pytest.fixture(scope="module")
def model(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


@pytest.mark.parametrize(
    ("count", "names"),
    [(12, ["in.csv"]), pytest.param(300, ["in.csv", "in.json", "in.jsonl.gz"], marks=pytest.mark.full)],
)
def test_the_same_prompts_complete_alike_from_every_format(
    model: Path, tmp_path: Path, count: int, names: list[str]
) -> None:
    import fsspec
    from pyarrow import Table, parquet

    entries = [{"id": f"p{number}", "prompt": f"word {number}, " * (1 + number % 3)} for number in range(count)]
    requests = write_jsonl(tmp_path / "in.jsonl", entries)
    (tmp_path / "in.csv").write_text("id,prompt\n" + "".join(f'{e["id"]},"{e["prompt"]}"\n' for e in entries))
    (tmp_path / "in.json").write_text(json.dumps(entries, indent=1))
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(requests.read_bytes()))
    parquet.write_table(Table.from_pylist(entries), tmp_path / "in.parquet")
    fsspec.filesystem("memory").pipe("/job/in.parquet", (tmp_path / "in.parquet").read_bytes())
    run(model, requests, tmp_path / "out.jsonl")
    wanted = (tmp_path / "out.jsonl").read_text()
    others = [str(tmp_path / name) for name in names]
    for number, other in enumerate([*others, "memory://job/in.parquet"]):
        run(model, other, tmp_path / f"out{number}.jsonl")
        assert (tmp_path / f"out{number}.jsonl").read_text() == wanted


def test_an_output_at_a_url_is_uploaded_at_the_end_and_again_after_a_failure(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    files, monitor = fsspec.filesystem("memory"), pytest.MonkeyPatch()
    monkeypatch.chdir(tmp_path)
    words = ["run", "-m", str(model), "--dtype", "float32", "--offload", "cpu", "--max-new-tokens", "2"]
    words += ["--prompt", "word", "-o", "memory://uploads/out.jsonl"]
    try:
        monitor.setattr(type(files), "put_file", lambda *given, **how: 1 / 0)
        error = command_line(words).exception
        assert isinstance(error, OutputError)
        assert "cannot upload out.jsonl to memory://uploads/out.jsonl" in error.message
        assert "all results are in out.jsonl" in str(error.hint)
        assert len(read_jsonl(tmp_path / "out.jsonl")) == 1
        monitor.undo()
        again = command_line([*words, "--resume"])
        assert (again.exception, "uploaded to memory://uploads/out.jsonl" in again.stderr) == (None, True)
        assert files.cat("/uploads/out.jsonl") == (tmp_path / "out.jsonl").read_bytes()
    finally:
        monitor.undo()
        files.store.clear()


@pytest.mark.full
def test_s3_gives_and_takes_what_a_folder_does(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs, server = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    monkeypatch.chdir(tmp_path)
    local = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    local.start()
    host, port = local.get_host_and_port()
    own = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    for name, value in {**own, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        requests = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"word {number}"} for number in range(300)])
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        files.put_file(str(requests), "bucket/in/in.jsonl")
        run(model, requests, tmp_path / "wanted.jsonl")
        words = ["run", "-m", str(model), "--dtype", "float32", "--offload", "cpu", "--max-new-tokens", "4"]
        words += ["-i", "s3://bucket/in/*.jsonl", "-o"]
        absent = command_line([*words, "s3://absent/out.jsonl"]).exception
        assert isinstance(absent, OutputError)
        assert "The specified bucket does not exist" in absent.message
        assert not (tmp_path / "out.jsonl.journal").exists(), "nothing was run"
        assert command_line([*words, "s3://bucket/out/out.jsonl"]).exception is None
        assert files.cat("bucket/out/out.jsonl") == (tmp_path / "wanted.jsonl").read_bytes()
        assert files.find("bucket/out") == ["bucket/out/out.jsonl"]
    finally:
        local.stop()


def test_columns_of_the_input_are_in_the_output(model: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    entries = [
        {"id": "a", "text": "one", "label": 1, "tags": ["x"], "when": None},
        {"id": "b", "text": "two words", "label": 2.5, "tags": [], "when": "now"},
    ]
    requests = write_jsonl(tmp_path / "in.jsonl", [*entries, {"id": "c", "label": 3}])
    shape = EntryShape(template="word {{ text }}", keep=("label", "tags", "when"))
    for out in (tmp_path / "out.jsonl", tmp_path / "out.parquet"):
        outcome = run(model, requests, out, shape=shape)
        assert (outcome.requests, outcome.refused) == (2, 1)
    lines = read_jsonl(tmp_path / "out.jsonl")
    assert [{name: line[name] for name in ("id", "label", "tags", "when")} for line in lines] == [
        {name: entry[name] for name in ("id", "label", "tags", "when")} for entry in entries
    ]
    assert all(line["prompt_tokens"] > 1 for line in lines)
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["id"], row["completion"], row["label"], row["tags"], row["when"]) for row in rows] == [
        ("a", lines[0]["completion"], 1.0, '["x"]', None),
        ("b", lines[1]["completion"], 2.5, "[]", "now"),
    ]


def test_settings_of_openai_requests_are_carried_out(model: Path, tmp_path: Path) -> None:
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer("one two")["input_ids"]
    entries: list[dict[str, Any]] = [
        {"id": "plain", "prompt": "one two"},
        {"id": "tokens", "prompt": ids},
        {"id": "penalty", "prompt": "one two", "repetition_penalty": 0.2},
        {"id": "bias", "prompt": "one two", "logit_bias": {"70": 100}},
        {"id": "echo", "prompt": "one two", "echo": True},
        {"id": "samples", "prompt": ["one", "two"], "n": 2, "temperature": 1.0},
        {"id": "cut", "prompt": "zero one two", "truncate_prompt_tokens": len(ids)},
        {"id": "beyond", "prompt": "one", "logit_bias": {"99999999": 1}},
    ]
    entries = [{**entry, "ignore_eos": True, "max_tokens": 6} for entry in entries]
    outcome = run(model, write_jsonl(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl")
    assert outcome.refused == 1
    found = read_jsonl(tmp_path / "out.jsonl")
    text = {line["id"]: line["completion"] for line in found}
    assert text["tokens"] == text["plain"] and text["echo"] == "one two" + text["plain"]
    assert text["bias"] == tokenizer.decode([70] * 6)
    kwargs: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "repetition_penalty": 0.2}
    penalized = plain.generate(torch.tensor([ids]), **kwargs)[0, len(ids) :]
    assert text["penalty"] == tokenizer.decode(penalized, skip_special_tokens=True) != text["plain"]
    assert [(line["id"], line["choice"]) for line in found if "choice" in line] == [("samples", i) for i in range(4)]
    (cut,) = (line for line in found if line["id"] == "cut")
    assert cut["prompt_tokens"] == len(ids)


def test_a_batch_of_openai_is_answered_on_standard_output_and_cut_answers_are_counted(
    model: Path, tmp_path: Path
) -> None:
    lines = [
        {"custom_id": f"r{n}", "method": "post", "url": "v1/completions", "body": {"prompt": "one", "model": "m"}}
        for n in range(2)
    ]
    requests, stdout, said = write_jsonl(tmp_path / "in.jsonl", lines), io.StringIO(), list[str]()

    class Ear(Deaf):
        def note(self, text: str) -> None:
            said.append(text)

    options = RunOptions(
        model=str(model),
        sampling=Sampling(max_new_tokens=DEFAULT_NEW_TOKENS),
        dtype="float32",
        offload="cpu",
        input_files=(str(requests),),
        to_stdout=True,
    )
    outcome = run_job(options, World(), torch.device("cpu"), stdout, Ear())
    assert outcome is not None and outcome.report is not None and outcome.report.cut == 2
    assert any(text.startswith("2 of 2 completions were cut at the default of 128 tokens") for text in said)
    found = [json.loads(line) for line in stdout.getvalue().splitlines()]
    assert [(line["custom_id"], line["response"]["body"]["model"]) for line in found] == [("r0", "m"), ("r1", "m")]
    assert found[0]["response"]["body"]["choices"][0]["finish_reason"] == "length"
