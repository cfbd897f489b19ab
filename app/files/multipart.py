"""Read a multipart upload as a stream: form fields into memory, the part `file` straight to storage.

Does not cover: what the fields mean (`app.files.service`). Starlette's own form parser spools the file and limits
form fields only; here every byte of the file is counted as it arrives, and at most one piece waits in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.core.errors import InvalidRequest
from app.files.storage import Incoming

PIECE_BYTES = 1024**2  # parsed, hashed and written together in a thread
MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096
OVERHEAD_BYTES = 128 * 1024  # what fields and boundaries may add to the file
DEFAULT_NAME = "upload"


@dataclass
class Form:
    """What came besides the bytes of the file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def receive_form(chunks: AsyncIterable[bytes], content_type: str, sink: Incoming) -> Form:
    """Read to the end. Raises InvalidRequest, and `storage.TooLarge` when the file is above the sink's limit."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("Send multipart/form-data with the parts 'file' and 'purpose'.")
    try:
        reader = _Reader(boundary, sink)
        piece = bytearray()
        async for chunk in chunks:
            piece += chunk
            if len(piece) >= PIECE_BYTES:
                await asyncio.to_thread(reader.feed, bytes(piece))
                piece.clear()
        await asyncio.to_thread(reader.feed, bytes(piece))
    except FormParserError as error:
        raise InvalidRequest(f"The multipart body cannot be read: {error}") from error
    return reader.result()


class _Reader:
    """Callbacks of the push parser; one part is open at a time."""

    def __init__(self, boundary: bytes, sink: Incoming) -> None:
        self._form, self._sink = Form(), sink
        self._header, self._value = b"", b""
        self._disposition = b""
        self._name: str | None = None
        self._text = bytearray()
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> None:
        self._parser.write(data)

    def result(self) -> Form:
        if not self._ended:
            raise InvalidRequest("The multipart body ends before its last boundary.")
        if self._form.filename is None:
            raise InvalidRequest("Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
        return self._form

    def _part_begin(self) -> None:
        self._disposition, self._header, self._value, self._name = b"", b"", b"", None
        self._text.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = _text(options.get(b"name", b""))
        if self._name == "file":
            if self._form.filename is not None:
                raise InvalidRequest("Send one file per request.", param="file")
            self._form.filename = _clean(_text(options.get(b"filename", b"")))
        elif self._name in self._form.fields or len(self._form.fields) >= MAX_FIELDS:
            raise InvalidRequest(f"Too many form fields, or '{self._name}' twice.", param=self._name[:64] or None)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._sink.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise InvalidRequest(
                f"The form field is longer than {MAX_FIELD_BYTES} bytes.", param=(self._name or "")[:64]
            )

    def _part_end(self) -> None:
        if self._name is not None and self._name != "file":
            self._form.fields[self._name] = _text(bytes(self._text))

    def _end(self) -> None:
        self._ended = True


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _clean(name: str) -> str:
    """A name fit to be shown; it is never a path here, so nothing else has to be taken from it."""
    shown = "".join(character for character in name if character.isprintable())
    return shown[:255] or DEFAULT_NAME
