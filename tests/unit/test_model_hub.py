"""A hub that cannot be reached is not tried again and again."""

from __future__ import annotations

import subprocess
import sys

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
