"""What the model hub answered when it did not give a file, in the user's words."""

from __future__ import annotations

from collections.abc import Iterator

from zeroinf.errors import ModelError


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
        return ModelError(
            f"{location} is not in the local cache, and the model hub cannot be reached",
            hint="check the network and HF_HUB_OFFLINE, or pass a local folder; `--model demo` needs no network",
        )
    return ModelError(
        f"{location} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        hint="check the spelling, `hf auth login`, or pass a local folder",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
