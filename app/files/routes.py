"""`/v1/files`: upload, list, retrieve, content, delete.

Does not cover: `/v1/uploads` (files in parts).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from app.files import repository, service
from app.files.repository import Order
from app.files.schemas import DeletedFile, FileList, FileObject
from app.web.deps import CallerDep, DatabaseDep, SettingsDep, StorageDep

MAX_PAGE = 10_000
PIECE_BYTES = 1024**2

router = APIRouter()

_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(service.UPLOAD_PURPOSES)},
                        "expires_after": {
                            "type": "object",
                            "required": ["anchor", "seconds"],
                            "properties": {
                                "anchor": {"type": "string", "enum": ["created_at"]},
                                "seconds": {
                                    "type": "integer",
                                    "minimum": service.EXPIRES_S.start,
                                    "maximum": service.EXPIRES_S.stop - 1,
                                },
                            },
                        },
                    },
                },
                "encoding": {"expires_after": {"style": "deepObject", "explode": True}},
            }
        },
    }
}


@router.post("/files", openapi_extra=_UPLOAD)
async def create_file(
    request: Request, caller: CallerDep, settings: SettingsDep, database: DatabaseDep, storage: StorageDep
) -> FileObject:
    """Upload a file; a `fine-tune` file is checked line by line before the answer."""
    content_type, declared = request.headers.get("content-type", ""), request.headers.get("content-length", "")
    declared_bytes = int(declared) if declared.isdecimal() else None
    async with database.begin() as session:
        expired = await repository.remove_expired(session)
    await service.remove_bytes(storage, expired)
    async with database.read() as session:
        await service.require_room(session, caller.project_id, 1)
    async with (
        service.receiving(
            storage, database, request.stream(), content_type, declared_bytes, settings.max_file_bytes
        ) as received,
        database.begin() as session,
    ):
        row = await service.register(session, caller.project_id, received)
    return FileObject.of(row)


@router.get("/files")
async def list_files(
    caller: CallerDep,
    database: DatabaseDep,
    purpose: Annotated[str | None, Query(description="Only files of this purpose.")] = None,
    after: Annotated[str | None, Query(description="Id of the last file of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    order: Annotated[Order, Query(description="By creation time.")] = "desc",
) -> FileList:
    async with database.read() as session:
        page = await service.listed(session, caller.project_id, purpose=purpose, after=after, order=order, limit=limit)
    data = [FileObject.of(row) for row in page.items]
    return FileList(
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get("/files/{file_id}")
async def retrieve_file(file_id: str, caller: CallerDep, database: DatabaseDep) -> FileObject:
    async with database.read() as session:
        return FileObject.of(await service.find(session, caller.project_id, file_id))


@router.get("/files/{file_id}/content", response_class=StreamingResponse)
async def download_file(
    file_id: str, caller: CallerDep, database: DatabaseDep, storage: StorageDep
) -> StreamingResponse:
    async with database.read() as session:
        row = await service.find(session, caller.project_id, file_id)
    headers = {
        "content-length": str(row.bytes),
        "content-disposition": f"attachment; filename*=utf-8''{quote(row.filename, safe='')}",
    }
    pieces = _pieces(await service.content(storage, row))
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


@router.delete("/files/{file_id}")
async def delete_file(file_id: str, caller: CallerDep, database: DatabaseDep, storage: StorageDep) -> DeletedFile:
    async with database.begin() as session:
        await service.delete(session, caller.project_id, file_id)
    await service.remove_bytes(storage, [file_id])
    return DeletedFile(id=file_id)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE_BYTES):
            yield piece
