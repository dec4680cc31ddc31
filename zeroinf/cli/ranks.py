"""Encodes the arguments of a rank on another node as one word of letters, digits, `-`, `_` and `=`.

DeepSpeed's launcher passes arguments through a shell on the other node. The encoded word contains nothing that a shell
would interpret. Environment variables that ranks need travel in the same word.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence

BY_HOSTFILE = "ZEROINF_BY_HOSTFILE"
"""Set for ranks that `--hostfile` has started."""

_INHERITED = ("ZEROINF_", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "OMP_NUM_THREADS")
"""What of the environment ranks need everywhere. No tokens: the word is for all to see in the list of processes."""


def packed(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """The word for `arguments`, in which letters, digits, `-`, `_` and `=` stand."""
    inherited = {name: value for name, value in environ.items() if name.startswith(_INHERITED)}
    return base64.urlsafe_b64encode(json.dumps([list(arguments), inherited]).encode()).decode()


def unpacked(word: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a word."""
    arguments, inherited = json.loads(base64.urlsafe_b64decode(word))
    return arguments, inherited


if __name__ == "__main__":
    from zeroinf.cli.main import main

    sys.argv[1:], inherited = unpacked(sys.argv[-1])
    os.environ.update(inherited, **{BY_HOSTFILE: "1"})
    main()
