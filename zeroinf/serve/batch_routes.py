"""Routes of files and batches."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.datastructures import UploadFile

from zeroinf.serve.app import json_of
from zeroinf.serve.asks import read_object
from zeroinf.serve.batches import Batches
from zeroinf.serve.errors import ApiError
from zeroinf.serve.files import FileStore, page_of
from zeroinf.serve.gateway import Gateway

_PURPOSES = ("batch", "user_data")
_NAME_LENGTH = 255


def add_batches(app: FastAPI, gateway: Gateway, files: FileStore, batches: Batches) -> None:
    """Add them to `app`."""
    _add_files(app, gateway, files)

    @app.post("/v1/batches")
    async def create(request: Request) -> dict[str, Any]:
        """Begin a batch."""
        body = read_object(await json_of(request))
        _ = gateway.service
        batch = await asyncio.to_thread(batches.create, body)
        return batch.to_json()

    @app.get("/v1/batches")
    async def everything(limit: int = Query(20, ge=1, le=100), after: str | None = None) -> dict[str, Any]:
        """Batches, the newest first."""
        return page_of(batches.all(), limit, after)

    @app.get("/v1/batches/{batch_id}")
    async def one(batch_id: str) -> dict[str, Any]:
        """A batch."""
        return batches.get(batch_id).to_json()

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> dict[str, Any]:
        """Let a batch end with what it has come to."""
        batch = await asyncio.to_thread(batches.cancel, batch_id)
        return batch.to_json()


def add_no_batches(app: FastAPI) -> None:
    """Say of each of those routes what is missing."""

    async def refuse(rest: str = "") -> None:
        raise ApiError(400, "this server keeps no files and batches: start it with --state FOLDER")

    for path in ("/v1/files", "/v1/files/{rest:path}", "/v1/batches", "/v1/batches/{rest:path}"):
        app.add_api_route(path, refuse, methods=["GET", "POST", "DELETE"], include_in_schema=False)


def _add_files(app: FastAPI, gateway: Gateway, files: FileStore) -> None:
    @app.post("/v1/files")
    async def upload(request: Request) -> dict[str, Any]:
        """Keep a file."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(415, "the body must be a form: Content-Type: multipart/form-data")
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "the form has no file", param="file")
            if purpose not in _PURPOSES:
                raise ApiError(400, f"purpose must be {' or '.join(map(repr, _PURPOSES))}", param="purpose")
            if unknown := next((name for name in form if name not in ("file", "purpose")), None):
                raise ApiError(400, f"{unknown} is not supported", param=unknown)
            if (file.size or 0) > gateway.settings.max_file_bytes:
                raise ApiError(413, f"the file may have {gateway.settings.max_file_bytes} bytes, not {file.size}")
            name = (file.filename or "upload")[:_NAME_LENGTH]
            kept = await asyncio.to_thread(files.add, file.file, name, str(purpose))
        return kept.to_json()

    @app.get("/v1/files")
    async def everything(
        purpose: str | None = None,
        limit: int = Query(10_000, ge=1, le=10_000),
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """Files, the newest first."""
        return page_of(files.all(purpose), limit, after, order)

    @app.get("/v1/files/{file_id}")
    async def one(file_id: str) -> dict[str, Any]:
        """A file's description."""
        return files.get(file_id).to_json()

    @app.get("/v1/files/{file_id}/content")
    async def content(file_id: str) -> Response:
        """The contents of a file."""
        return FileResponse(files.content(file_id), media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}")
    async def delete(file_id: str) -> dict[str, Any]:
        """Forget a file. A batch that was made of it keeps its input."""
        await asyncio.to_thread(files.delete, file_id)
        return {"id": file_id, "object": "file", "deleted": True}
