"""Opens files at URLs and uploads outputs to them, through fsspec and the package that it needs for their kind.

A missing package is named with the command that installs it, and an output that cannot be looked at is refused, before
the long work.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from zeroinf.errors import EnvironmentProblem, InputError, OutputError
from zeroinf.jobs.output_files import OVERWRITE_HINT, errors_path

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("abfs", "abfss", "az"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "hf": "huggingface_hub",
    "hdfs": "pyarrow",
    "oss": "ossfs",
    "oci": "ocifs",
    "smb": "smbprotocol",
}
"""What reads the URLs of a scheme, by the name under which pip installs it."""


_PROBE = ".zeroinf-probe"


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


def url_of(path: Path) -> str | None:
    """The URL that was taken for a path, which has one slash less then; None for a path."""
    scheme, *rest = path.parts
    is_one = len(scheme) > 2 and is_url(f"{scheme}//") and rest and not Path(scheme).exists()
    return f"{scheme}//{'/'.join(rest)}" if is_one else None


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of `url`, and the path in it. Raises EnvironmentProblem for a package that is not installed,
    InputError for a URL of a kind that nobody knows."""
    from fsspec.core import url_to_fs

    match = _URL.match(url)
    assert match is not None
    scheme = match[1].lower()
    try:
        files, path = url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        hint = f"pip install {package}" if package else "install the package that it names"
        raise EnvironmentProblem(f"{scheme}:// needs a package that is not here: {error}", hint=hint) from error
    except Exception as error:  # each kind of file system has errors of its own
        raise InputError(f"cannot open {url}: {_words(error)}") from error
    return files, path


def check_upload(url: str, *, overwrite: bool, resume: bool) -> None:
    """To be called before the long work: a file of no bytes is written beside `url`, and removed.

    Raises OutputError where that fails, and where something is there that would be lost; EnvironmentProblem for a
    missing package."""
    if url.lower().startswith(("http://", "https://")):
        raise OutputError(f"-o {url}: nothing is written by HTTP", hint="name a file, or s3://, gs://, hf://...")
    try:
        files, path = open_filesystem(url)
    except InputError as error:
        raise OutputError(error.message, hint=error.hint) from error
    try:
        files.invalidate_cache()
        taken = not overwrite and not resume and files.exists(path)
        if not taken and not url.lower().startswith("hf:"):  # where it would be a commit
            files.pipe_file(f"{path}{_PROBE}", b"")
            with suppress(Exception):  # who may write may not always remove
                files.rm_file(f"{path}{_PROBE}")
    except Exception as error:
        raise OutputError(f"cannot write {url}: {_words(error)}", hint="check its name, and the credentials") from error
    if taken:
        raise OutputError(f"{url} exists already", hint=OVERWRITE_HINT)


def upload(output: Path, url: str) -> list[str]:
    """Copy a finished output, and the file of its errors, to `url`; what was written, by URLs.

    Raises OutputError where that fails; the local files stay in any case.
    """
    ending = errors_path(Path("x")).name.removeprefix("x")
    written: list[str] = []
    for file, target in ((errors_path(output), f"{url}{ending}"), (output, url)):
        if not file.exists():
            continue
        try:
            files, path = open_filesystem(target)
            files.put_file(str(file), path)
        except Exception as error:
            raise OutputError(
                f"cannot upload {file} to {target}: {_words(error)}",
                hint=f"all results are in {output}; the same command with --resume uploads them again",
            ) from error
        written.append(target)
    return written


def name_of(url: str) -> str:
    """The name of the local file whose copy goes to `url`. Raises OutputError for the URL of a folder."""
    name = PurePosixPath(url.partition("://")[2]).name
    if url.endswith("/") or "/" not in url.partition("://")[2]:
        raise OutputError(f"-o {url} names no file", hint=f"{url.rstrip('/')}/out.jsonl")
    return name


def _words(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
