"""What `hone doctor` says of Redis: does it answer, and would it keep what it is told.

Does not cover: Celery's workers, which beat in the database. Nothing here stops a job: workers look for jobs by
themselves every few seconds (`workers.slot`), a ring only spares that wait. So all faults are warnings, but for a
missing package, without which API and workers do not start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from app.cli.findings import DEADLINE_S, Finding, NoAnswer, Verdict, quoted, within

if TYPE_CHECKING:
    from app.core.settings import Settings

NAME = "redis"
MEANS = "jobs wait up to 5 s for a worker to look"
SHAPE = "redis://:PASSWORD@HOST:6379/0, special characters in the password as %XX"


def broker(settings: Settings) -> Iterator[Finding]:
    url = settings.redis_url
    if url is None:
        yield Finding(NAME, Verdict.OK, "not used (HONE_REDIS_URL): workers look for jobs by themselves")
        return
    if find_spec("celery") is None or find_spec("redis") is None:
        missing = "HONE_REDIS_URL is set, and Celery is not installed"
        yield Finding(NAME, Verdict.PROBLEM, missing, "pip install 'hone-rft[celery]'")
        return
    from redis import exceptions

    try:
        where = _place(url)
    except ValueError:
        yield Finding(NAME, Verdict.PROBLEM, "HONE_REDIS_URL cannot be read", f"it looks like {SHAPE}")
        return
    if where is None:
        yield Finding(NAME, Verdict.WARNING, "HONE_REDIS_URL was not looked at: neither redis:// nor rediss://", SHAPE)
        return
    try:
        info = within(lambda: _info(url), DEADLINE_S)
    except exceptions.AuthenticationError as error:
        detail = f"{where} refuses the password: {quoted(error, url)}; {MEANS}"
        yield Finding(NAME, Verdict.WARNING, detail, f"put the right one into HONE_REDIS_URL ({SHAPE})")
    except exceptions.NoPermissionError as error:
        detail = f"{where} answers, but does not tell about itself: {quoted(error, url)}"
        yield Finding(NAME, Verdict.WARNING, detail, "let this user call INFO: ACL SETUSER NAME +info")
    except (exceptions.RedisError, OSError, NoAnswer) as error:
        detail = f"{where} does not answer: {quoted(error, url)}; {MEANS}"
        yield Finding(NAME, Verdict.WARNING, detail, "start Redis there, or name another in HONE_REDIS_URL")
    else:
        yield from kept(where, info)


def kept(where: str, info: Mapping[str, Any]) -> Iterator[Finding]:
    """From the answer to INFO: the version, and what a full memory or a restart would do to waiting rings."""
    yield Finding(NAME, Verdict.OK, f"{info.get('redis_version', 'unknown version')} at {where}")
    change = f"redis-cli -u redis://{where} CONFIG SET"
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        detail = f"{where} throws rings away when its memory is full (maxmemory-policy {policy})"
        yield Finding(NAME, Verdict.WARNING, detail, f"{change} maxmemory-policy noeviction; and in redis.conf")
    if not info.get("aof_enabled", 1):
        detail = f"{where} forgets rings when it restarts (appendonly no)"
        yield Finding(NAME, Verdict.WARNING, detail, f"{change} appendonly yes; and in redis.conf")


def _place(url: str) -> str | None:
    """Host, port and database number, without user and password; None: no plain Redis. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss"):
        return None
    if not parts.hostname:
        raise ValueError("no host")
    return f"{parts.hostname}:{parts.port or 6379}{parts.path}"


def _info(url: str) -> Mapping[str, Any]:
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    retry = Retry(NoBackoff(), 0)  # the default asks four times, which takes longer than our deadline
    with Redis.from_url(url, socket_connect_timeout=DEADLINE_S, socket_timeout=DEADLINE_S, retry=retry) as client:
        answer: Mapping[str, Any] = client.info()
        return answer
