"""URLs as inputs and outputs, each kind against a server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_hub import fake_hub

from zeroinf.cli.main import cli
from zeroinf.errors import EnvironmentProblem, InputError, OutputError, ZeroinfError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.inputs import find_inputs
from zeroinf.jobs.readers import read_inputs
from zeroinf.jobs.remote import check_upload, name_of, upload, url_of

PROMPTS = [f"word {number}" for number in range(300)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = (json.dumps({"id": prompt, "prompt": prompt}) for prompt in PROMPTS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in.jsonl").write_text("".join(line + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def memory() -> Iterator[Any]:
    import fsspec

    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def prompts_at(url: str) -> list[str]:
    return [entry.prompt for entry in read_inputs((), find_inputs([url]), Sampling(max_new_tokens=4))]  # type: ignore[union-attr, misc]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        pass


def test_files_on_a_web_server_are_read(folder: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}/data"
    try:
        assert prompts_at(f"{base}/in.jsonl") == PROMPTS
        with pytest.raises(InputError, match=f"no such input file: {base}/absent.jsonl"):
            prompts_at(f"{base}/absent.jsonl")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(InputError, match=f"cannot read {base}/in.jsonl: Cannot connect"):
        prompts_at(f"{base}/in.jsonl")
    with pytest.raises(OutputError, match="nothing is written by HTTP"):
        check_upload(f"{base}/out.jsonl", overwrite=True, resume=False)


def test_files_of_a_data_set_of_the_hub_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with fake_hub({"me/prompts": folder}) as hub:
        files = huggingface_hub.HfFileSystem(endpoint=hub.endpoint, token=False, skip_instance_cache=True)
        monkeypatch.setattr("zeroinf.jobs.inputs.open_filesystem", lambda url: (files, url.removeprefix("hf://")))
        for name in ("datasets/me/prompts/data/in.jsonl", "datasets/me/prompts/data", "datasets/me/prompts/*/*.jsonl"):
            assert prompts_at(f"hf://{name}") == PROMPTS
        with pytest.raises(InputError, match=r"no such input file: hf://datasets/me/absent/in\.jsonl"):
            prompts_at("hf://datasets/me/absent/in.jsonl")


def test_an_output_becomes_a_commit_of_a_data_set_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    out, there, url = folder / "out.jsonl", folder / "there", "hf://datasets/me/answers/runs/out.jsonl"
    out.write_text("results\n")
    (folder / "out.jsonl.errors.jsonl").write_text("errors\n")
    there.mkdir()
    with fake_hub({"me/answers": there}) as hub:
        files = huggingface_hub.HfFileSystem(endpoint=hub.endpoint, token="a-token", skip_instance_cache=True)
        monkeypatch.setattr("zeroinf.jobs.remote.open_filesystem", lambda url: (files, url.removeprefix("hf://")))
        check_upload(url, overwrite=False, resume=False)
        assert not [path for command, path in hub.asked if "/commit/" in path], "looking is no commit"
        assert upload(out, url) == [f"{url}.errors.jsonl", url]
        assert (there / "runs" / "out.jsonl").read_text() == "results\n"
        assert (there / "runs" / "out.jsonl.errors.jsonl").read_text() == "errors\n"
        with pytest.raises(OutputError, match="exists already"):
            check_upload(url, overwrite=False, resume=False)
        with pytest.raises(OutputError, match=r"cannot upload .* to hf://datasets/me/absent/out\.jsonl"):
            upload(out, "hf://datasets/me/absent/out.jsonl")


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    for does in (
        lambda: prompts_at("az://container/in.jsonl"),
        lambda: check_upload("az://container/out.jsonl", overwrite=False, resume=False),
    ):
        with pytest.raises(EnvironmentProblem, match=r"az:// needs a package that is not here") as caught:
            does()
        assert caught.value.hint == "pip install adlfs"


def test_an_output_goes_to_its_url_with_its_errors_and_replaces_nothing_unasked(folder: Path, memory: Any) -> None:
    out = folder / "out.jsonl"
    out.write_text("results\n")
    (folder / "out.jsonl.errors.jsonl").write_text("errors\n")
    url = "memory://job/out.jsonl"
    check_upload(url, overwrite=False, resume=False)
    assert memory.find("/") == [], "nothing stays of looking whether it can be written"
    assert upload(out, url) == [f"{url}.errors.jsonl", url]
    assert memory.cat("/job/out.jsonl") == b"results\n"
    assert memory.cat("/job/out.jsonl.errors.jsonl") == b"errors\n"
    with pytest.raises(OutputError, match="exists already"):
        check_upload(url, overwrite=False, resume=False)
    check_upload(url, overwrite=False, resume=True)
    check_upload(url, overwrite=True, resume=False)


def test_an_upload_that_fails_names_the_local_copy(folder: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "out.jsonl"
    out.write_text("results\n")

    def fails(*given: Any, **how: Any) -> None:
        raise ConnectionError("the line is down")

    monkeypatch.setattr(type(memory), "put_file", fails)
    with pytest.raises(OutputError, match=r"to memory://job/out\.jsonl: the line is down") as caught:
        upload(out, "memory://job/out.jsonl")
    assert caught.value.hint == f"all results are in {out}; the same command with --resume uploads them again"
    assert out.read_text() == "results\n"


def test_a_url_that_was_taken_for_a_path_is_known_again(tmp_path: Path) -> None:
    assert url_of(Path("s3://bucket/a/out.jsonl")) == "s3://bucket/a/out.jsonl"
    assert [url_of(Path(path)) for path in ("out.jsonl", "a/out.jsonl", "/a/out.jsonl", "c:/x")] == [None] * 4
    assert name_of("s3://bucket/a/out.jsonl") == "out.jsonl"
    for url in ("s3://bucket", "s3://bucket/a/"):
        with pytest.raises(OutputError, match="names no file"):
            name_of(url)


def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_looked_for(memory: Any) -> None:
    asked = ["run", "-m", "./absent", "--prompt", "x", "-o"]
    for url, code, words in (
        ("az://container/out.jsonl", 4, "pip install adlfs"),
        ("https://example.com/out.jsonl", 2, "nothing is written by HTTP"),
        ("moon://job/out.jsonl", 2, "Protocol not known"),
    ):
        error = CliRunner().invoke(cli, [*asked, url], prog_name="zeroinf").exception
        assert isinstance(error, ZeroinfError)
        assert (error.exit_code, words in f"{error.message} {error.hint}") == (code, True)
