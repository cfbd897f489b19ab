"""Celery as a doorbell: its settings, chosen so that no job's fate depends on one of them.

Does not cover: the task (`workers.tasks`) and the sending side (`app.jobs.doorbell`).
"""

from __future__ import annotations

from typing import Any

from celery import Celery

from app.core.settings import Settings
from workers.doors import GRACE_S

CONF: dict[str, Any] = {
    # Acknowledged before it runs: with late acknowledgement Redis gives a task that outlives the visibility timeout
    # to the next worker, again and again for as long as it runs.
    "task_acks_late": False,
    "task_reject_on_worker_lost": False,
    "task_ignore_result": True,
    "result_backend": None,
    "task_serializer": "json",
    "accept_content": ["json"],
    # One job at a time, and no message held back from idle workers while it runs.
    "worker_concurrency": 1,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    # A thread waits for the supervisor, which is the process that works; so a broker that goes away ends nothing.
    "worker_pool": "threads",
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_soft_shutdown_timeout": GRACE_S,  # after SIGQUIT; SIGTERM ends the job itself, see `workers.tasks`
    "broker_connection_timeout": 2.0,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    # Nobody listens to a doorbell's own events, and nobody commands it over the broker.
    "worker_enable_remote_control": False,
    "worker_send_task_events": False,
    "worker_redirect_stdouts": False,
}


class NoBroker(ValueError):
    """HONE_REDIS_URL is not set."""


def make_celery(settings: Settings) -> Celery:
    """Raises `NoBroker`."""
    if settings.redis_url is None:
        raise NoBroker("HONE_REDIS_URL: a Celery worker needs the Redis that the API rings")
    celery = Celery("hone", broker=settings.redis_url, set_as_current=False)
    celery.conf.update(CONF)
    return celery
