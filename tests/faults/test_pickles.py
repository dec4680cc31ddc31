"""Pickled checkpoints are read as weights only: what would run code is refused, and runs nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import make_checkpoint
from test_stream_tokens import stream
from transformers import AutoModelForCausalLM

from zeroinf.errors import ModelError


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(offload: str, tmp_path: Path) -> None:
    folder, marker = make_checkpoint("llama", tmp_path / "model"), tmp_path / "it-ran"
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "payload": _Malicious(marker)}, folder / "pytorch_model.bin")
    where = {"nvme_blocks": 3, "nvme_paths": (tmp_path,)} if offload == "nvme" else {}
    with pytest.raises(ModelError, match="hold more than weights, and could run code"):
        stream(folder, offload=offload, **where)
    assert not marker.exists()
