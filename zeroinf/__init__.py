"""zeroinf: throughput inference for language models that do not fit the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeroinf.api import (
        AioSettings,
        Completion,
        Generated,
        Handle,
        Pipeline,
        Plan,
        Result,
        TensorParallel,
        TokenEvent,
        generate,
        pipeline,
        plan,
    )
    from zeroinf.serve.deploy import client, deploy, terminate

__version__ = "0.2.0"
__all__ = [
    "AioSettings",
    "Completion",
    "Generated",
    "Handle",
    "Pipeline",
    "Plan",
    "Result",
    "TensorParallel",
    "TokenEvent",
    "__version__",
    "client",
    "deploy",
    "generate",
    "pipeline",
    "plan",
    "terminate",
]
_OF_SERVERS = ("client", "deploy", "terminate")


def __getattr__(name: str) -> Any:
    """Import names that need torch on first use, so that `import zeroinf` stays light."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _OF_SERVERS:
        import zeroinf.serve.deploy

        return getattr(zeroinf.serve.deploy, name)
    import zeroinf.api

    return getattr(zeroinf.api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
