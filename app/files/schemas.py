"""Files on the wire (contract §10.1).

Does not cover: the multipart request, which is read as a stream (`app.files.multipart`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from app.db.tables import File


class FileObject(BaseModel):
    """An uploaded or produced file. `status` leaves `uploaded` before the upload is answered."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    expires_at: int | None
    status_details: str | None

    @classmethod
    def of(cls, row: File) -> FileObject:
        return cls.model_validate(
            {
                "id": row.id,
                "bytes": row.bytes,
                "created_at": int(row.created_at),
                "filename": row.filename,
                "purpose": row.purpose,
                "status": row.status,
                "expires_at": None if row.expires_at is None else int(row.expires_at),
                "status_details": row.status_details,
            }
        )


class FileList(BaseModel):
    """One page, in the order asked for."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedFile(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
