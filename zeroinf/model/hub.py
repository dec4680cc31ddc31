"""Checks whether the model hub can be reached, and explains its errors to the user."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, getproxies, urlopen

from zeroinf.errors import ModelError
from zeroinf.model.catalog import hub_ids_close_to

_REACHED_WITHIN_S = 2.0
_ANSWERS_WITHIN_S = 0.8


def hub_error(location: str, revision: str | None, error: BaseException) -> ModelError:
    """The ModelError that says why `location` could not be read: gated, not there, no network, or something else."""
    from huggingface_hub import errors

    causes = tuple(_causes(error))

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_any(errors.GatedRepoError):
        return _refused(location, revision, "GatedRepo")
    if is_any(errors.RevisionNotFoundError):
        return _refused(location, revision, "RevisionNotFound")
    if is_any(errors.RepositoryNotFoundError, errors.HFValidationError):
        return _refused(location, revision, "RepoNotFound")
    if is_any(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        return _unreachable(location)
    return ModelError(
        f"{location} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        hint="check the spelling, `hf auth login`, or pass a local folder",
    )


def require_at_hand(location: str, revision: str | None) -> None:
    """Raise ModelError within three seconds where neither the hub nor its cache has the model `location`.

    Sets HF_HUB_OFFLINE for this process if no connection to the hub can be made: huggingface_hub would try each file
    for half a minute, also those that its cache holds. It reads the variable when it is imported: to be called before.
    A hub that answers slowly is not waited for.
    """
    _work_offline_if_unreachable()
    from huggingface_hub import constants, errors, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(location, "config.json", revision=revision)
    except errors.HFValidationError as error:
        raise hub_error(location, revision, error) from error
    if isinstance(found, str):
        return
    if constants.HF_HUB_OFFLINE:
        raise _unreachable(location)
    if (code := _refusal(location, revision)) is not None:
        raise _refused(location, revision, code)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _work_offline_if_unreachable() -> None:
    """A proxy is taken to reach the hub."""
    if "HF_HUB_OFFLINE" in os.environ or {"https", "http", "all"} & set(getproxies()):
        return
    endpoint, reached = urlsplit(_endpoint()), threading.Event()

    def connect() -> None:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        try:
            socket.create_connection((endpoint.hostname or "", port), timeout=_REACHED_WITHIN_S).close()
        except OSError:
            return
        reached.set()

    attempt = threading.Thread(target=connect, daemon=True)  # looking up a name has no limit of its own
    attempt.start()
    attempt.join(_REACHED_WITHIN_S)
    if not reached.is_set():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _refusal(location: str, revision: str | None) -> str | None:
    """The hub's code for why it does not hand out the model's config; None where it does, or does not answer soon."""
    from huggingface_hub import get_token

    url = f"{_endpoint()}/{quote(location)}/resolve/{quote(revision or 'main', safe='')}/config.json"
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        urlopen(Request(url, headers=headers, method="HEAD"), timeout=_ANSWERS_WITHIN_S).close()
    except HTTPError as error:
        code = error.headers.get("X-Error-Code")
        return code if code in _REFUSALS else "RepoNotFound" if error.code == HTTPStatus.UNAUTHORIZED else None
    except (OSError, ValueError, HTTPException):
        return None
    return None


def _refused(location: str, revision: str | None, code: str) -> ModelError:
    message, hint = _REFUSALS[code]
    if code == "RepoNotFound" and (close := hub_ids_close_to(location)):
        hint = f"close to it: {', '.join(close)}; {hint}"
    return ModelError(message.format(location=location, revision=revision), hint=hint)


_REFUSALS = {
    "GatedRepo": (
        "{location} is gated: its owner must give you access",
        "ask for it on the model's page, then log in with: hf auth login",
    ),
    "RevisionNotFound": ("{location} has no revision {revision!r}", "check --revision"),
    "RepoNotFound": (
        "no model {location} on the hub, or it is private",
        "check the spelling; for a private model: hf auth login; for your own files: pass the folder",
    ),
    "EntryNotFound": (
        "{location} on the hub holds no config.json",
        "of GGUF files, download one (hf download REPOSITORY FILE) and pass its path",
    ),
}
"""By the codes with which the hub answers."""


def _unreachable(location: str) -> ModelError:
    return ModelError(
        f"{location} is not in the local cache, and the model hub cannot be reached",
        hint="check the network and HF_HUB_OFFLINE, or pass a local folder; `--model demo` needs no network",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
