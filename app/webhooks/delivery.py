"""Send what waits in the outbox: one pass claims what is due, signs it, posts it, and writes down how it went.

Does not cover: who runs the passes (`workers.janitor`), nor which rows are due (`repository`). Any number of processes
may send at once. Delivery is at least once: a sender that dies after the receiver's answer is followed by a second
request with the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from app.core.settings import Settings
from app.db.engine import Database
from app.net.clients import EgressPolicy, HttpClient, guarded_client
from app.net.exchange import Attempted, Retry, Unanswered, post_json
from app.security.vault import Vault, VaultError, load_vault
from app.webhooks import repository, schemas, signing
from app.webhooks.repository import Attempt

log = logging.getLogger("hone.webhooks")

TIMEOUT_S = 15.0  # from dialling to the last byte of the answer
LEASE_S = 60.0  # after it a delivery whose sender fell silent is tried by another
AT_ONCE, PER_ENDPOINT = 32, 4  # an endpoint that hangs delays the others by one deadline, and takes no more of a pass
# After each failed attempt, the pause to the next: 67 hours in all, then the delivery is given up.
BACK_OFF_S: Sequence[float] = (5, 30, 120, 600, 3600, 6 * 3600, 12 * 3600, 24 * 3600, 24 * 3600)
GONE = 410  # the receiver says that it wants no more
_ONCE = Retry(max_retries=0)  # the row remembers attempts, a process would forget them


@dataclass(frozen=True)
class _Outcome:
    """`error` None: delivered."""

    status: int | None
    error: str | None
    asked_pause_s: float = 0.0


class Courier:
    """Sends for as long as its process lives. `jitter` gives numbers in [0, 1)."""

    def __init__(
        self, database: Database, vault: Vault, http: HttpClient, *, jitter: Callable[[], float] = random.random
    ) -> None:
        self._database = database
        self._vault = vault
        self._http = http
        self._jitter = jitter
        self._round: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, settings: Settings, database: Database) -> Courier:
        """As configured. Raises VaultError, EgressPolicyError."""
        key = settings.secret_key.get_secret_value() if settings.secret_key else None
        http = guarded_client(EgressPolicy.parse(settings.egress_allow), timeout_s=TIMEOUT_S, max_connections=AT_ONCE)
        return cls(database, load_vault(key, settings.root), http)

    def kick(self) -> None:
        """Begin a pass beside the caller's loop, unless one is under way. Raises nothing: jobs do not wait for this."""
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(self._pass())

    async def _pass(self) -> None:
        try:
            await self.deliver_due()
        except SQLAlchemyError as error:
            log.warning("webhooks: the database refused: %s", error)
        except Exception:  # a fault of ours; it must not end the process that runs jobs. The lease brings the row again
            log.exception("webhooks: a pass failed")

    async def close(self) -> None:
        """Requests in flight are dropped; their rows come up again when the lease ends."""
        if self._round is not None:
            self._round.cancel()
            await asyncio.gather(self._round, return_exceptions=True)
        await self._http.aclose()

    async def deliver_due(self) -> int:
        """One pass; how many attempts it made. Reads only, when nothing is due."""
        async with self._database.read() as session:
            due = await repository.due(session, AT_ONCE, PER_ENDPOINT)
        if not due:
            return 0
        async with self._database.begin() as session:
            claims = [await repository.claim(session, seq, attempts, LEASE_S) for seq, attempts in sorted(due)]
        attempts = [attempt for attempt in claims if attempt is not None]
        # All to their end: an answer that could not be written down must not cost the others theirs.
        for ended in await asyncio.gather(*map(self._deliver, attempts), return_exceptions=True):
            if ended is not None:
                raise ended
        return len(attempts)

    async def _deliver(self, attempt: Attempt) -> None:
        outcome = await self._send(attempt)
        endpoint = attempt.endpoint
        async with self._database.begin() as session:
            if outcome.error is None:
                await repository.delivered(session, attempt, outcome.status or 0)
                return
            if outcome.status == GONE:
                await repository.disable(session, endpoint.id, "the endpoint answered 410: it wants no more events")
            else:
                pause = self._pause_s(attempt.number, outcome.asked_pause_s)
                await repository.failed(session, attempt, status=outcome.status, error=outcome.error, again_in_s=pause)
        log.warning(
            "webhook %s for %s to %s, attempt %d: %s",
            attempt.delivery.event_id, attempt.delivery.job_id, endpoint.id, attempt.number, outcome.error,
        )  # fmt: skip

    def _pause_s(self, attempts: int, asked_s: float) -> float | None:
        """None: enough. A Retry-After lengthens a pause, never beyond the longest of ours."""
        if attempts > len(BACK_OFF_S):
            return None
        pause = BACK_OFF_S[attempts - 1] * (0.8 + 0.4 * self._jitter())
        return max(pause, min(asked_s, BACK_OFF_S[-1]))

    async def _send(self, attempt: Attempt) -> _Outcome:
        delivery, url = attempt.delivery, attempt.endpoint.url
        body = schemas.body(
            event_id=delivery.event_id, type=delivery.type, created_at=delivery.created_at, job_id=delivery.job_id
        )
        try:
            secrets = self._secrets(attempt)
        except VaultError as error:
            return _Outcome(None, f"its secret cannot be opened: {error}")
        headers = {
            "content-type": "application/json",
            **signing.headers(delivery.event_id, attempt.at, body, secrets),
        }
        seen: list[Attempted] = []
        try:
            answer = await post_json(
                self._http, url, body, headers, timeout_s=TIMEOUT_S, deadline=None, retry=_ONCE, watch=seen.append
            )
        except Unanswered as error:
            last = seen[-1]
            return _Outcome(last.status, error.last_error, last.retry_after_s or 0.0)
        if 200 <= answer.status < 300:
            return _Outcome(answer.status, None)
        return _Outcome(answer.status, f"answered {answer.status}")

    def _secrets(self, attempt: Attempt) -> list[str]:
        """The secret in force, and for a day after a rotation the one before. Raises VaultError."""
        endpoint = attempt.endpoint
        sealed = [endpoint.secret]
        if endpoint.old_secret is not None and (endpoint.old_secret_until or 0.0) > attempt.at:
            sealed.append(endpoint.old_secret)
        return [self._vault.open(token, endpoint.id) for token in sealed]
