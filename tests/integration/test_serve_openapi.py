"""schemathesis reads the server's own description of its API, sends what that allows and forbids, and finds nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from http_serving import server

from zeroinf.jobs.fields import Body

RULES = Path(__file__).parents[1] / "data" / "schemathesis.toml"


@pytest.fixture(scope="module")
def folder(small_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template."""
    own = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(small_checkpoint("llama"), own)
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return own


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="needs schemathesis")
@pytest.mark.parametrize(
    ("phases", "examples", "key"),
    [
        ("fuzzing", 1, None),
        pytest.param("coverage,fuzzing,stateful", 40, "s3cret", marks=[pytest.mark.full, pytest.mark.timeout(900)]),
    ],
)
def test_schemathesis_finds_nothing(folder: Path, tmp_path: Path, phases: str, examples: int, key: str | None) -> None:
    with server(folder, state=tmp_path / "state", api_key=key) as (client, _):
        described = client.get("/openapi.json", headers={"authorization": f"Bearer {key}"}).json()
        check_bodies(described)
        asked = [f"{client.base_url}/openapi.json", "--phases", phases, "--max-examples", str(examples), "--seed", "7"]
        header = [] if key is None else ["-H", f"Authorization: Bearer {key}"]
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(RULES), "run", *asked, *header]
        done = subprocess.run(
            [*command, "--no-color", "--generation-database", "none"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        assert "Operations:       20 selected" in done.stdout, "as many as there are"
        assert client.get("/health").status_code == 200


def check_bodies(described: dict[str, object]) -> None:
    """Each key of requests is described."""
    paths = httpx.Response(200, json=described).json()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(Body.model_fields) <= set(body["properties"])


def test_a_wrong_method_is_told_all_right_ones(folder: Path, tmp_path: Path) -> None:
    with server(folder, state=tmp_path / "state") as (client, _):
        refused = client.put("/v1/files")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, POST")
        assert client.request("PATCH", "/v1/files/file-1").headers["allow"] == "DELETE, GET"
