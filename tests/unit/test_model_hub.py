"""A hub that cannot be reached is not tried again and again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fake_hub import fake_hub

_PROGRAM = """
import os, socket, sys
import zeroinf.model.hub as hub
from zeroinf.errors import ModelError
for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
with socket.create_server(("127.0.0.1", 0)) as server:
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.getsockname()[1]}"
    if sys.argv[1] == "listens":
        hub.require_at_hand("nobody/nothing", None)
if sys.argv[1] == "proxy":
    os.environ["https_proxy"] = "http://proxy"
    hub.require_at_hand("nobody/nothing", None)
print(os.environ.get("HF_HUB_OFFLINE"))
if sys.argv[1] == "closed":
    try:
        hub.require_at_hand("nobody/nothing", None)
    except ModelError as error:
        print(error, os.environ["HF_HUB_OFFLINE"], "torch" in sys.modules)
"""


def test_only_a_hub_that_takes_no_connection_is_left_alone() -> None:
    def says(how: str) -> str:
        return subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, check=True).stdout

    assert says("listens") == "None\n"
    assert says("proxy") == "None\n"
    missing = "nobody/nothing is not in the local cache, and the model hub cannot be reached"
    assert says("closed") == f"None\n{missing} 1 False\n"


_ASKING = """
import sys, time
from zeroinf.model.resolve import check_name
from zeroinf.errors import ModelError
for location, revision in (("org/model", None), ("org/modle", None), ("org/model", "v2"), ("org/gguf", None),
                           ("meta-llama/Llama-2-7b-fh", None)):
    try:
        check_name(location, revision)
        print("there")
    except ModelError as error:
        print(f"{error.message} | {error.hint}")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_a_hub_that_has_no_such_model_is_asked_once_and_before_anything_long(tmp_path: Path) -> None:
    for name in ("model", "gguf"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with fake_hub({"org/model": tmp_path / "model", "org/gguf": tmp_path / "gguf"}) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PATH": "", "HF_TOKEN": "secret"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        done = subprocess.run([sys.executable, "-c", _ASKING], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        asked = [path for method, path in hub.asked if method == "HEAD"]
    said = done.stdout.splitlines()
    assert said[0] == "there"
    assert said[1].startswith("no model org/modle on the hub, or it is private | check the spelling")
    assert said[2].startswith("org/model has no revision 'v2' | check --revision")
    assert said[3].startswith("org/gguf on the hub holds no config.json | of GGUF files, download one")
    assert "close to it: meta-llama/Llama-2-7b-hf" in said[4]
    assert asked == [
        f"/{one}/config.json"
        for one in (
            "org/model/resolve/main",
            "org/modle/resolve/main",
            "org/model/resolve/v2",
            "org/gguf/resolve/main",
            "meta-llama/Llama-2-7b-fh/resolve/main",
        )
    ]
