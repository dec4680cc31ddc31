"""Kernels are compiled on a thread of their own; what could not be compiled is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import small_config

from zeroinf.engines.stream import products
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


def test_kernels_are_tried_once_however_many_threads_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, begun, goes_on = list[int](), threading.Event(), threading.Event()

    @cache
    def slow(*_: Any) -> bool:
        tried.append(1)
        begun.set()
        return goes_on.wait(60)

    monkeypatch.setattr(products, "_tried", slow)
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(products.expert_products, torch.device("cpu"), torch.bfloat16, None) for _ in range(2)]
        assert begun.wait(60)
        time.sleep(0.05)  # for the other one to try, too
        goes_on.set()
        assert [each.result(60) for each in asking] == [True, True]
    assert tried == [1]


def test_what_is_found_as_kernels_are_tried_keeps_no_caller_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, compiled = threading.Event(), threading.Event()

    def found() -> Iterator[Any]:
        assert goes_on.wait(60)
        yield compiled.set

    monkeypatch.setattr(warm_up, "_compilations", lambda model, plan, device: found())
    source: Any = SimpleNamespace(config=small_config("llama"), trust_remote_code=False)
    plan: Any = SimpleNamespace(dtype="float32")
    with closing(WarmUp(plan, source, torch.device("cpu"))) as warm:
        goes_on.set()
        assert not warm.wait()
    assert compiled.is_set()
