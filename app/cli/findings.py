"""One line of `hone doctor`: what was looked at, how it is, and what to do about it; and how far a look may go.

Does not cover: the looking (`doctor` and the modules named after it).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from threading import Thread
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from app.core.settings import Settings

T = TypeVar("T")

DEADLINE_S = 4.0  # for whatever is asked outside this process
MASK = "***"
QUOTED_CHARS = 300
_MIN_SECRET_CHARS = 4  # a shorter password would shred every text it is masked in
_USERINFO = re.compile(r"[^\s\"'/]+@")


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, or will once a job needs it
    PROBLEM = "problem"  # no job can run


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    verdict: Verdict
    detail: str
    fix: str | None = None


Check = Callable[["Settings"], Iterator[Finding]]


class NoAnswer(Exception):
    """The other side did not answer in time."""


def within(look: Callable[[], T], seconds: float) -> T:
    """What `look` returns or raises. Raises `NoAnswer` when that takes longer.

    Its thread is left behind then: a name server or a network disk that hangs cannot be called off.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(look())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=work, name="look", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise NoAnswer(f"no answer within {seconds:g} s") from None


def quoted(error: BaseException, url: str = "") -> str:
    """What a driver says, on one line. What stands before an @ is left out, and the password of `url`.

    A password with an @ or a / in it makes drivers take its end for the host, and name that.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Several tries at once are listed below a heading that says nothing.
    text = " ".join(line.strip() for line in lines)[:QUOTED_CHARS] if lines[0].rstrip().endswith(":") else lines[0]
    try:
        password = urlsplit(url).password or ""
    except ValueError:
        password = ""
    for secret in {password, unquote(password)}:
        if len(secret) >= _MIN_SECRET_CHARS:
            text = text.replace(secret, MASK)
    return _USERINFO.sub(f"{MASK}@", text).rstrip(" .")
