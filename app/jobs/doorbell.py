"""Tell workers of a job at once: a Celery message by task name, on the queue of its model. Without Redis: nothing.

Does not cover: owning a job. The row is the job and the message a doorbell: one that is lost, late or doubled changes
nothing but the seconds until a worker looks (`workers.slot` polls, and `leases.claim` is won once).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from fnmatch import fnmatchcase
from queue import Full, Queue
from typing import TYPE_CHECKING, Protocol

from app.core.errors import ServiceError
from app.core.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)

TASK = "hone.take"  # what `workers.tasks` registers
DEFAULT_QUEUE = "hone"
MAX_WAITING = 1000  # rings kept while the broker is away; the rest is left to the poll
CLOSE_S = 3.0
# Every wait of a send is short: nobody waits for it, but the rings behind it do.
SENDING = {
    "broker_connection_timeout": 2.0,
    "broker_transport_options": {"socket_connect_timeout": 2.0, "socket_timeout": 2.0},
    "task_ignore_result": True,
    "task_publish_retry": True,
    "task_publish_retry_policy": {"max_retries": 1, "interval_start": 0.2, "interval_step": 0.0, "interval_max": 0.2},
    "task_serializer": "json",
}


class BadQueues(ServiceError):
    """HONE_QUEUES is not `model=queue, …`; the message names the part."""


class NoCelery(ServiceError):
    """HONE_REDIS_URL is set and Celery is not installed."""


class Doorbell(Protocol):
    def ring(self, job_id: str, model: str) -> None:
        """After the commit. Returns at once and never fails."""

    def close(self) -> None:
        """Blocking, at most `CLOSE_S`: lets what was rung go out."""


class Silent:
    """No broker: whoever runs jobs looks for them."""

    def ring(self, job_id: str, model: str) -> None:
        return None

    def close(self) -> None:
        return None


class Bell:
    """Sends from one thread of its own, so that a broker that hangs delays neither a request nor an event loop."""

    def __init__(self, celery: Celery, queues: str) -> None:
        self._celery = celery
        self._queues = queues
        self._waiting: Queue[tuple[str, str] | None] = Queue(MAX_WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="doorbell", daemon=True)
        self._thread.start()

    def ring(self, job_id: str, model: str) -> None:
        try:
            self._waiting.put_nowait((job_id, queue_of(self._queues, model)))
        except Full:
            log.warning("the doorbell of %s was not rung: %d others wait for the broker", job_id, MAX_WAITING)

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(Full):
            self._waiting.put_nowait(None)
        self._thread.join(CLOSE_S)

    def _send_all(self) -> None:
        while (ring := self._waiting.get()) is not None:
            job_id, queue = ring
            try:
                self._celery.send_task(TASK, args=[job_id], queue=queue)
            except Exception as error:  # of kombu, the driver or the system: all end the same way, and the thread stays
                log.warning("the doorbell of %s was not rung (%s); a worker finds it when it next looks", job_id, error)
                if self._closing.is_set():  # the others would fare no better
                    return


def make_doorbell(settings: Settings) -> Doorbell:
    """Raises `BadQueues`, `NoCelery`."""
    queue_of(settings.queues, "")
    if settings.redis_url is None:
        return Silent()
    try:
        from celery import Celery
    except ImportError:
        raise NoCelery("HONE_REDIS_URL is set, but Celery is missing: pip install 'hone-rft[celery]'") from None
    celery = Celery("hone", broker=settings.redis_url, set_as_current=False)
    celery.conf.update(SENDING)
    return Bell(celery, settings.queues)


def queue_of(queues: str, model: str) -> str:
    """The queue of the first pattern in `queues` ("big-*=large, …") that fits. Raises `BadQueues`."""
    found = DEFAULT_QUEUE
    for part in reversed([part.strip() for part in queues.split(",") if part.strip()]):
        pattern, equals, queue = (piece.strip() for piece in part.partition("="))
        if not (pattern and equals and queue):
            raise BadQueues(f"HONE_QUEUES: {part!r} is not model=queue")
        if fnmatchcase(model, pattern):
            found = queue
    return found
