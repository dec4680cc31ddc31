"""Servers in this process, on a free port of loopback, over small models or over one that only pretends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from serving import NEW_TOKENS, serving

from zeroinf.generation.row import Sampling
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.serve.app import make_app
from zeroinf.serve.batch_routes import add_batches, add_no_batches
from zeroinf.serve.batches import Batches
from zeroinf.serve.files import FileStore
from zeroinf.serve.gateway import Gateway
from zeroinf.serve.page_routes import add_page
from zeroinf.serve.server import answering, bind, job_reader
from zeroinf.serve.settings import Settings

MODEL = "small"


@contextmanager
def answered(gateway: Gateway, *more: Any) -> Iterator[httpx.Client]:
    """A client of a server of `gateway`."""
    with (
        answering(make_app(gateway, *more), bind(gateway.settings)) as address,
        httpx.Client(base_url=address) as client,
    ):
        yield client


@contextmanager
def server(
    folder: Path, *, slow_s: float = 0.0, plan: dict[str, Any] | None = None, **settings: Any
) -> Iterator[tuple[httpx.Client, Gateway]]:
    """A server of the checkpoint in `folder`, each of whose passes takes `slow_s` longer."""
    with ExitStack() as closing:
        service = closing.enter_context(serving(folder, **(plan or {})))
        if slow_s:
            slow_down(service.model, slow_s)
        gateway = Gateway(Settings(**{"model_name": MODEL, "port": 0, **settings}), Sampling(max_new_tokens=NEW_TOKENS))
        gateway.open(service)
        more: list[Any] = [add_page]
        if gateway.settings.state is not None:
            files = FileStore(gateway.settings.state / "files", gateway.settings.max_state_bytes)
            batches = Batches(gateway.settings.state / "batches", files, gateway)
            options = RunOptions(model=str(folder), sampling=gateway.defaults)
            batches.start(service, job_reader(options, resolve_model(str(folder)), "cpu"))
            closing.callback(batches.stop)
            more.append(lambda app, gateway: add_batches(app, gateway, files, batches))
        else:
            more.append(lambda app, gateway: add_no_batches(app))
        yield closing.enter_context(answered(gateway, *more)), gateway


def slow_down(model: Any, seconds: float) -> None:
    """Let each pass of a loaded model take so much longer."""
    import time

    forward: Callable[..., Any] = model.engine.forward

    def slower(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return forward(*given, **named)

    model.engine.forward = slower
