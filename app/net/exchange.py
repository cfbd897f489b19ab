"""One JSON request to a user's endpoint: retries, back-off, deadline, size caps, and a reason when it comes to nothing.

Does not cover: what an answer means (`app.tools.http`, `app.graders.endpoint`) and where it may go (`app.net.guard`).
A failure that another attempt cannot mend (a refused address, a redirect) is reported at once.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import httpx

from app.net.clients import CONNECT_TIMEOUT_S, EgressDenied, HttpClient
from app.net.endpoint import Mask, quote, show_url

MAX_BODY_BYTES = 1024 * 1024  # both ways (contract §7.4, §7.5: 1 MB)
LONGEST_ASKED_PAUSE_S = 60.0  # a Retry-After beyond this is a refusal when no deadline says otherwise
# Statuses that speak of the moment, not of the request: a model must not be punished for them.
TRANSIENT_4XX = frozenset({408, 425, 429})


@dataclass(frozen=True)
class Attempted:
    """How one attempt ended, for whoever paces the next ones. `status` None: there was no complete answer."""

    status: int | None
    seconds: float
    retry_after_s: float | None = None


Watch = Callable[[Attempted], None]


class Gate(Protocol):
    """Something every attempt waits for, such as a rate limit."""

    async def wait(self, within_s: float) -> None:
        """Return when the next request may leave. Raises TimeoutError when that is not within `within_s`."""


@dataclass(frozen=True)
class Retry:
    """How often and after which pause a request is repeated. `jitter` gives numbers in [0, 1)."""

    max_retries: int = 3  # contract §7.4
    base_s: float = 0.25
    cap_s: float = 4.0
    jitter: Callable[[], float] = random.random

    def pause_s(self, attempt: int) -> float:
        """Seconds after failed attempt number `attempt` (from 1): doubling, capped, between half and all of it."""
        ceiling = min(self.cap_s, self.base_s * float(2 ** (attempt - 1)))
        return ceiling * (0.5 + 0.5 * self.jitter())


@dataclass(frozen=True)
class Answer:
    """A final answer: 2xx, or a 4xx that is about the request. `body` None: it was larger than MAX_BODY_BYTES."""

    status: int
    body: bytes | None
    attempts: int
    seconds: float


class Unanswered(Exception):
    """No usable answer after `attempts`. `last_error` is safe to show: it holds no header value and no query."""

    def __init__(self, url: str, attempts: int, last_error: str, seconds: float) -> None:
        self.url = show_url(url)
        self.attempts = attempts
        self.last_error = last_error
        self.seconds = seconds
        super().__init__(f"{self.url}: {last_error} (attempts: {attempts})")


class _Fault(Exception):
    """One attempt failed. `again`: another one may succeed."""

    def __init__(
        self, reason: str, *, again: bool, retry_after_s: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        self.retry_after_s = retry_after_s
        self.status = status


async def post_json(
    http: HttpClient,
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    timeout_s: float,
    deadline: float | None,
    retry: Retry | None = None,
    gate: Gate | None = None,
    watch: Watch | None = None,
    mask: Mask | None = None,
) -> Answer:
    """POST `body` until there is an answer, `retry` is used up, or `deadline` (time.monotonic()) is near.

    timeout_s bounds one attempt from dialling to the last byte; `watch` hears how each ended. Raises Unanswered.
    mask: for what no reason may hold beside the headers and what the URL holds. An `Answer` is as it came.
    """
    retry, mask = retry or Retry(), mask or Mask()
    started = time.monotonic()
    attempt, last = 0, "its deadline passed before the first attempt"

    def unanswered(reason: str) -> Unanswered:
        return Unanswered(url, attempt, _hidden(mask, headers, url)(reason), time.monotonic() - started)

    while True:
        left = _left(deadline)
        if left <= 0:
            raise unanswered(last)
        if gate is not None:
            try:
                await gate.wait(left)
            except TimeoutError:
                raise unanswered("its rate limit left no turn before the deadline") from None
        limit = min(timeout_s, max(_left(deadline), 0.001))
        attempt += 1
        asked = time.monotonic()
        try:
            async with asyncio.timeout(limit):
                status, content = await _attempt(http, url, body, headers, limit, mask)
            if watch is not None:
                watch(Attempted(status, time.monotonic() - asked))
            return Answer(status, content, attempt, time.monotonic() - started)
        except TimeoutError:
            fault = _Fault(f"no complete answer within {limit:.3g} s", again=True)
        except _Fault as error:
            fault = error
        if watch is not None:
            watch(Attempted(fault.status, time.monotonic() - asked, fault.retry_after_s))
        last = fault.reason
        if not fault.again or attempt > retry.max_retries:
            raise unanswered(last) from None
        pause = max(retry.pause_s(attempt), fault.retry_after_s or 0.0)
        left = _left(deadline)
        if pause >= left:
            raise unanswered(f"{last}; the deadline left no time for another attempt") from None
        if deadline is None and pause > LONGEST_ASKED_PAUSE_S:
            raise unanswered(f"{last}; it asked for a pause of {pause:.0f} s") from None
        await asyncio.sleep(pause)


def _hidden(mask: Mask, headers: Mapping[str, str], url: str) -> Mask:
    return mask | Mask.of(headers, url=url)  # when something went wrong only: most requests need none


def _left(deadline: float | None) -> float:
    return float("inf") if deadline is None else deadline - time.monotonic()


async def _attempt(
    http: HttpClient, url: str, body: bytes, headers: Mapping[str, str], limit: float, mask: Mask
) -> tuple[int, bytes | None]:
    timeout = httpx.Timeout(limit, connect=min(limit, CONNECT_TIMEOUT_S))
    try:
        async with http.stream("POST", _parsed(url), content=body, headers=dict(headers), timeout=timeout) as response:
            status = response.status_code
            encoding = response.headers.get("content-encoding", "identity")
            if encoding not in ("", "identity"):
                raise _Fault(f"answered in the encoding {encoding!r}; only identity is accepted", again=False)
            content = await _capped(response)
    except EgressDenied as error:
        raise _Fault(str(error), again=False) from None
    except httpx.TransportError as error:
        raise _Fault(_reason(error), again=not isinstance(error, _HOPELESS)) from None
    except (httpx.InvalidURL, UnicodeError) as error:
        raise _Fault(f"the request cannot be written ({type(error).__name__})", again=False) from None
    if 300 <= status < 400:
        raise _Fault(f"answered with the redirect {status}, which is not followed; give the final URL", again=False)
    if status >= 500 or status in TRANSIENT_4XX:
        pause = _retry_after(response.headers.get("retry-after"))
        said = f": {quote(content, _hidden(mask, headers, url))}" if content else ""
        raise _Fault(f"answered {status}{said}", again=True, retry_after_s=pause, status=status)
    return status, content


@functools.lru_cache(maxsize=256)
def _parsed(url: str) -> httpx.URL:
    return httpx.URL(url)  # a job calls a handful of addresses thousands of times


_HOPELESS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)


def _reason(error: httpx.TransportError) -> str:
    detail = f": {error}" if str(error) else ""
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_S:g} s"
    if isinstance(error, httpx.TimeoutException):
        return f"no answer in time ({type(error).__name__})"
    if isinstance(error, httpx.LocalProtocolError):
        return "the request cannot be written"  # h11 quotes the header value that it refused
    if isinstance(error, httpx.ConnectError):
        return f"cannot connect{detail}"
    return f"the connection failed ({type(error).__name__}){detail}"


async def _capped(response: httpx.Response) -> bytes | None:
    """The body, or None as soon as it is known to be larger than the cap; the rest is never read."""
    announced = response.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        return None
    chunks = bytearray()
    async for chunk in response.aiter_raw():
        chunks += chunk
        if len(chunks) > MAX_BODY_BYTES:
            return None
    return bytes(chunks)


def _retry_after(value: str | None) -> float | None:
    """Seconds that the endpoint asked for, as a number or an HTTP date (RFC 9110 §10.2.3); None when unreadable."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
