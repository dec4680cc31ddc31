"""The page at `/`, and what it shows of a server."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import Response

from zeroinf.hardware.process import resident
from zeroinf.planner.memory import MemoryPlace, taken
from zeroinf.planner.plan import Plan
from zeroinf.planner.summary import plan_lines
from zeroinf.serve.gateway import Gateway

_FOLDER = Path(__file__).parent / "page"


def add_page(app: FastAPI, gateway: Gateway) -> None:
    """Add the page and its `/status` to `app`. The page loads nothing from elsewhere, and may not."""
    html, script = ((_FOLDER / name).read_bytes() for name in ("index.html", "page.js"))
    style = re.search(rb"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1]).digest()).decode()
    headers = {
        "Content-Security-Policy": f"default-src 'none'; script-src 'self'; style-src 'sha256-{digest}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/page.js", include_in_schema=False)
    async def page_script() -> Response:
        return Response(script, media_type="text/javascript; charset=utf-8", headers=headers)

    @app.get("/status")
    async def status() -> dict[str, Any]:
        """The facts that the page shows: load, plan, memory, and counts of which it makes rates."""
        return status_of(gateway)


def status_of(gateway: Gateway) -> dict[str, Any]:
    """Counts are since the start, `time` in seconds of a clock that never goes back."""
    model, (running, waiting) = gateway.model, gateway.load()
    told: dict[str, Any] = {
        "model": gateway.settings.model_name,
        "state": gateway.state,
        "time": time.monotonic(),
        "running": running,
        "waiting": waiting,
        "tokens": gateway.metrics.tokens,
        "keeps_batches": gateway.settings.state is not None,
        "plan": [],
        "memory": [],
        **dict.fromkeys(("passes", "streamed_bytes", "kv_cache_usage"), 0),
        **dict.fromkeys(("planned_tokens_per_second", "max_new_tokens")),
    }
    if model is None:
        return told
    plan, stats = model.plan, model.engine.stats()
    return told | {
        "plan": list(plan_lines(plan)),
        "memory": _memory(plan),
        "max_new_tokens": plan.new_tokens,
        "passes": stats.passes,
        "streamed_bytes": stats.streamed_bytes,
        "kv_cache_usage": gateway.kv_cache_usage,
        "planned_tokens_per_second": None if plan.timing is None else plan.timing.tokens_per_second,
    }


def _memory(plan: Plan) -> list[dict[str, Any]]:
    """Bytes by place: planned, and what this process has of it."""
    used: dict[MemoryPlace, int] = {"host": resident().total_bytes}
    if plan.device == "cuda":
        used["gpu"] = torch.cuda.memory_reserved()
    return [{"place": place, "planned": taken(plan.terms, place), "used": nbytes} for place, nbytes in used.items()]
