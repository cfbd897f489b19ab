"""The stream reader, however the bytes are cut."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.core.errors import InvalidRequest
from app.files.multipart import MAX_FIELD_BYTES, Form, receive_form
from app.files.storage import Storage, TooLarge

TYPE = "multipart/form-data; boundary=xyz"


def _part(name: str, content: bytes, extra: str = "") -> bytes:
    return f'--xyz\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + content + b"\r\n"


GOOD = _part("purpose", b"fine-tune") + _part("file", b"\r\n--xy\r\n{}", '; filename="a/b\x07.jsonl"') + b"--xyz--\r\n"


async def _receive(tmp_path: Path, body: bytes, cut: int, limit: int = 1000, kind: str = TYPE) -> tuple[Form, bytes]:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), cut):
            yield body[start : start + cut]

    with Storage(tmp_path).receive(limit) as sink:
        form = await receive_form(chunks(), kind, sink)
        sink.finish()
        return form, sink.path.read_bytes()


@pytest.mark.parametrize("cut", [1, 7, 64, 10_000])
async def test_fields_and_file_arrive_whole(tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.files.multipart.PIECE_BYTES", cut)
    form, content = await _receive(tmp_path, GOOD, cut)
    assert form.fields == {"purpose": "fine-tune"}
    assert content == b"\r\n--xy\r\n{}"
    assert form.filename == "a/b.jsonl"  # shown, never a path


async def test_a_body_that_stops_early_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="ends before"):
        await _receive(tmp_path, GOOD[:-10], 1000)


async def test_a_file_above_the_limit_stops_the_reading(tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        await _receive(tmp_path, GOOD, 1000, limit=5)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (_part("purpose", b"fine-tune") + b"--xyz--\r\n", "'file'"),
        (_part("file", b"1") + _part("file", b"2") + b"--xyz--\r\n", "one file"),
        (_part("purpose", b"x" * (MAX_FIELD_BYTES + 1)) + b"--xyz--\r\n", "longer"),
        (b"".join(_part(f"f{n}", b"") for n in range(30)) + b"--xyz--\r\n", "Too many"),
        (b"not multipart at all", "cannot be read"),
    ],
)
async def test_a_bad_form_is_a_400(tmp_path: Path, body: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        await _receive(tmp_path, body, 1000)


async def test_another_content_type_is_a_400(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="multipart/form-data"):
        await _receive(tmp_path, b"{}", 10, kind="application/json")
