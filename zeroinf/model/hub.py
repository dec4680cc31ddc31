"""Checks whether the model hub can be reached, and explains its errors to the user."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies

from zeroinf.errors import ModelError

_REACHED_WITHIN_S = 2.0


def _work_offline_if_unreachable() -> None:
    """A proxy is taken to reach the hub."""
    if "HF_HUB_OFFLINE" in os.environ or {"https", "http", "all"} & set(getproxies()):
        return
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=_REACHED_WITHIN_S).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def hub_error(location: str, revision: str | None, error: BaseException) -> ModelError:
    """The ModelError that says why `location` could not be read: gated, not there, no network, or something else."""
    from huggingface_hub import errors

    causes = tuple(_causes(error))

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_any(errors.GatedRepoError):
        return ModelError(
            f"{location} is gated: its owner must give you access",
            hint="ask for it on the model's page, then log in with: hf auth login",
        )
    if is_any(errors.RevisionNotFoundError):
        return ModelError(f"{location} has no revision {revision!r}", hint="check --revision")
    if is_any(errors.RepositoryNotFoundError, errors.HFValidationError):
        return ModelError(
            f"no model {location} on the hub, or it is private",
            hint="check the spelling; for a private model: hf auth login; for your own files: pass the folder",
        )
    if is_any(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        return _unreachable(location)
    return ModelError(
        f"{location} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        hint="check the spelling, `hf auth login`, or pass a local folder",
    )


def require_at_hand(location: str, revision: str | None) -> None:
    """Raise ModelError where the hub is not, or cannot be, asked for the model `location`, and its cache has none.

    Sets HF_HUB_OFFLINE for this process if no connection to the hub can be made: huggingface_hub would try each file
    for half a minute, also those that its cache holds. It reads the variable when it is imported: to be called before.
    """
    _work_offline_if_unreachable()
    from huggingface_hub import constants, errors, try_to_load_from_cache

    try:
        if constants.HF_HUB_OFFLINE and not try_to_load_from_cache(location, "config.json", revision=revision):
            raise _unreachable(location)
    except errors.HFValidationError as error:
        raise hub_error(location, revision, error) from error


def _unreachable(location: str) -> ModelError:
    return ModelError(
        f"{location} is not in the local cache, and the model hub cannot be reached",
        hint="check the network and HF_HUB_OFFLINE, or pass a local folder; `--model demo` needs no network",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
