"""What a user may write down as an endpoint: a URL and headers; and how both are shown again without their secrets.

Does not cover: whether the address may be reached (`app.net.guard`, at dial time) or who stores the headers (`vault`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

MASK = "***"
MAX_URL_CHARS = 2048
MAX_HEADERS = 32
MAX_HEADER_VALUE_CHARS = 8192
QUOTED_CHARS = 300

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_VALUE = re.compile(r"[\t\x20-\x7e]*")
# Framing belongs to the client; a user's value here would let one request carry a second one.
_OURS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "expect"}
)


def check_url(url: str) -> str:
    """The URL itself, or ValueError with a reason that never repeats it (it may hold a secret)."""
    if len(url) > MAX_URL_CHARS:
        raise ValueError(f"is longer than {MAX_URL_CHARS} characters")
    if any(character.isspace() or ord(character) < 0x20 for character in url):
        raise ValueError("contains white space or control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
        httpx.URL(url)  # stricter in places than the standard library, and it is what will send
    except (ValueError, httpx.InvalidURL):
        raise ValueError("is not a valid URL") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("must start with http:// or https://")
    if not parts.hostname:
        raise ValueError("has no host")
    if port == 0:
        raise ValueError("has port 0")
    if "@" in parts.netloc:
        raise ValueError("must not contain a user name or password; send them in headers, which are stored encrypted")
    return url


def check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """A copy of the headers, or ValueError naming the header (never its value) and the rule it breaks."""
    if len(headers) > MAX_HEADERS:
        raise ValueError(f"has more than {MAX_HEADERS} headers")
    seen: set[str] = set()
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name[:64]!r} is not a valid header name")
        if name.lower() in _OURS:
            raise ValueError(f"{name!r} is set by the service and cannot be given")
        if name.lower() in seen:
            raise ValueError(f"{name!r} is given twice")
        if len(value) > MAX_HEADER_VALUE_CHARS:
            raise ValueError(f"the value of {name!r} is longer than {MAX_HEADER_VALUE_CHARS} characters")
        if not _VALUE.fullmatch(value):
            raise ValueError(f"the value of {name!r} has characters outside printable ASCII")
        seen.add(name.lower())
    return dict(headers)


def show_url(url: str) -> str:
    """The URL for messages and logs: without user name, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(unreadable URL)"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" + ("?…" if parts.query else "")


def hide_secrets(text: str, url: str, headers: Mapping[str, str]) -> str:
    """`text` with every header value, and whatever credentials the URL holds, masked.

    An endpoint may echo what it was sent in its error page, so this runs over everything quoted from outside. Masks
    the last word of a value too (`Bearer TOKEN`). Values under 4 characters stay: masking them would shred the text.
    """
    found = {piece for value in headers.values() for piece in (value.strip(), *value.split()[-1:])}
    parts = urlsplit(url)
    found |= {parts.query, parts.password or "", *(pair.partition("=")[2] for pair in parts.query.split("&"))}
    for secret in sorted((piece for piece in found if len(piece) >= 4), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def quote(body: bytes, url: str, headers: Mapping[str, str]) -> str:
    """The beginning of an answer for a message, on one line; secrets are masked before it is cut, not after."""
    text = " ".join(hide_secrets(body.decode("utf-8", "replace"), url, headers).split())
    return (text[:QUOTED_CHARS] + "…" if len(text) > QUOTED_CHARS else text) or "(empty)"
