"""Kernels are compiled on a thread of their own; what could not be compiled is told."""

from __future__ import annotations

import threading
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import small_config

from zeroinf.service import warm_up
from zeroinf.service.warm_up import WarmUp


def warming_up(monkeypatch: pytest.MonkeyPatch, *compilations: Any) -> WarmUp:
    monkeypatch.setattr(warm_up, "_compilations", lambda model, plan, device: list(compilations))
    source: Any = SimpleNamespace(config=small_config("llama"), trust_remote_code=False)
    plan: Any = SimpleNamespace(dtype="float32")
    return WarmUp(plan, source, torch.device("cpu"))


def test_all_is_compiled_while_the_caller_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, threads = threading.Event(), set[int]()

    def compile_some() -> None:
        assert goes_on.wait(60)
        threads.add(threading.get_ident())

    with closing(warming_up(monkeypatch, compile_some, compile_some)) as warm:
        goes_on.set()
        assert not warm.wait()
    assert threads
    assert threads != {threading.get_ident()}


def test_a_kernel_that_does_not_compile_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = threading.Event()

    def fail() -> None:
        raise RuntimeError("no ptxas\nhere")

    with closing(warming_up(monkeypatch, fail, compiled.set)) as warm:
        assert warm.wait() == "RuntimeError: no ptxas"
    assert compiled.is_set()  # the others are, all the same
