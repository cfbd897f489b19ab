"""What a user may write down as an endpoint: a URL and headers; and how both are shown again without their secrets.

Does not cover: whether the address may be reached (`app.net.guard`, at dial time) or who stores the headers (`vault`).
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote as percent_encoded
from urllib.parse import unquote_plus, urlsplit

import httpx

MASK = "***"
MAX_URL_CHARS = 2048
MAX_HEADERS = 32
MAX_HEADER_VALUE_CHARS = 8192
QUOTED_CHARS = 300
SHORTEST_MASKED, SHORTEST_INSIDE_WORDS = 4, 8

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_VALUE = re.compile(r"[\t\x20-\x7e]*")
# Framing belongs to the client; a user's value here would let one request carry a second one.
_OURS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "expect"}
)
# Ours, and those that say how a request is to be read: masking `train` or `application/json` would hide only sense.
_NO_SECRETS = frozenset(
    {"content-type", "content-language", "accept", "accept-encoding", "accept-language", "cache-control", "user-agent"}
) | {"x-rollout-id", "x-job-id", "x-step", "x-split", "idempotency-key", "traceparent", "tracestate"}


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


@dataclass(frozen=True)
class Mask:
    """Takes secrets out of what endpoints say back, for they may echo what they were sent. Masks add up with `|`.

    A header's value goes whole, and by each part that would do alone: its last word (`Bearer TOKEN`), what stands
    behind a `=` (cookies, digests), the pair inside `Basic`; plain, and as JSON, HTML and URLs escape it. Parts under
    4 characters stay and those under 8 go as whole words only, or they would shred the text.
    """

    pieces: tuple[str, ...] = field(default=(), repr=False)  # the longest first: one may be part of another

    @classmethod
    def of(cls, *headers: Mapping[str, str], url: str = "") -> Mask:
        """For everything that was sent in these headers, and for the credentials that the URL holds."""
        values = [value for each in headers for name, value in each.items() if name.lower() not in _NO_SECRETS]
        found = {part for value in values for part in _parts(value)} | _parts_of_url(url)
        forms = {form for part in found if len(part) >= SHORTEST_MASKED for form in _forms(part)}
        return cls(tuple(sorted(forms, key=lambda form: (-len(form), form))))

    def __or__(self, other: Mask) -> Mask:
        return Mask(tuple(sorted({*self.pieces, *other.pieces}, key=lambda form: (-len(form), form))))

    def __call__(self, text: str) -> str:
        for piece in self.pieces:
            if piece not in text:
                continue
            if len(piece) < SHORTEST_INSIDE_WORDS:
                text = re.sub(rf"(?<!\w){re.escape(piece)}(?!\w)", MASK, text)
            else:
                text = text.replace(piece, MASK)
        return text

    def value(self, value: Any) -> Any:
        """A copy of a JSON value with every text masked, keys too. Raises RecursionError as `json` does."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, dict):
            return {self(name): self.value(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [self.value(entry) for entry in value]
        return value


def quote(body: bytes, mask: Mask) -> str:
    """The beginning of an answer for a message, on one line; secrets are masked before it is cut, not after."""
    text = " ".join(mask(body.decode("utf-8", "replace")).split())
    return (text[:QUOTED_CHARS] + "…" if len(text) > QUOTED_CHARS else text) or "(empty)"


def _parts(value: str) -> set[str]:
    """What of a header's value lets somebody in."""
    words = value.split()
    parts = {value.strip(), *words[-1:]}
    parts |= {pair.partition("=")[2].strip('"') for pair in re.split(r"[\s;,]+", value)}
    if len(words) == 2 and words[0].lower() == "basic":
        try:
            pair = base64.b64decode(words[1], validate=True).decode()
        except ValueError:
            return parts  # then its server cannot read it either
        parts |= {pair, pair.partition(":")[2]}
    return parts


def _parts_of_url(url: str) -> set[str]:
    parts = urlsplit(url)
    values = {pair.partition("=")[2] for pair in parts.query.split("&")}
    return {parts.query, parts.password or "", *values, *map(unquote_plus, values)}


def _forms(part: str) -> set[str]:
    """The part as it may stand in a JSON body (with `/` escaped or not), in an HTML page, in a URL."""
    inside = json.dumps(part)[1:-1]
    return {part, inside, inside.replace("/", "\\/"), html.escape(part), percent_encoded(part, safe="")}
