"""`GET /metrics` in Prometheus text: the requests of this process, and what the rows tell about the whole service.

Does not cover: the engines, whose own metrics a scraper reads at their own port. No label grows with users: a route is
its template, and no id, key or project appears.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db.engine import Database
from app.web import figures
from app.web.figures import Figures
from app.web.single_flight import SingleFlight

DEADLINE_S = 5.0
# Chat waits for a sampler: seconds to minutes. Everything else is answered in milliseconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0)
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
API = "/v1"
UNMATCHED = "none"  # no route has this path; paths themselves would be labels without end

router = APIRouter(include_in_schema=False)


class Metrics:
    """The collectors of one application, in a registry of their own."""

    def __init__(self, database: Database) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "hone_http_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "hone_http_request_duration_seconds",
            "From the first byte of a request to the last of its answer.",
            ["method", "route"],
            buckets=BUCKETS,
            registry=self.registry,
        )

        async def look() -> Figures:
            async with database.read() as session:
                return await figures.read(session)

        self._figures = SingleFlight(look)

    async def text(self) -> bytes:
        """Everything; when the database does not answer in time, `hone_database_up 0` and what this process knows."""
        try:
            found: Figures | None = await self._figures.result(DEADLINE_S)
        except (SQLAlchemyError, OSError, TimeoutError):
            found = None
        rows = CollectorRegistry()
        rows.register(Rows(found))
        return generate_latest(self.registry) + generate_latest(rows)


class Measured:
    """Counts and times every request; outermost, so that it sees the answer that the client sees."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), "aborted"  # no answer was begun: the client went away

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = _template(scope)
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.seconds.labels(method, route).observe(time.monotonic() - began)


def _template(scope: Scope) -> str:
    """The path of the route that served, set by the router; some versions of FastAPI leave out an outer prefix."""
    found: str | None = getattr(scope.get("route"), "path", None)
    if found is None:
        return UNMATCHED
    return API + found if scope["path"].startswith(API + "/") and not found.startswith(API + "/") else found


class Rows(Collector):
    """`Figures` as metric families."""

    def __init__(self, found: Figures | None) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        yield _by("hone_build_info", "Version of the code, as a label.", "version", {_version(): 1})
        yield GaugeMetricFamily("hone_database_up", "1: the rows below were read.", float(self._found is not None))
        if self._found is None:
            return
        it = self._found
        yield _by("hone_jobs", "Jobs.", "status", it.jobs)
        yield _by("hone_rollouts", "Rollouts of jobs that have not ended.", "state", it.rollouts)
        yield _by("hone_phase_seconds", "Time spent by jobs that have not ended.", "phase", it.phase_seconds)
        yield GaugeMetricFamily(
            "hone_queue_age_seconds", "How long the job at the head of the queue has waited.", it.queue_age_s
        )
        yield GaugeMetricFamily("hone_leases_expired", "Running jobs whose worker is silent.", it.expired_leases)
        yield _by("hone_samplers", "Samplers alive.", "base_model", it.samplers)
        yield GaugeMetricFamily("hone_samplers_wanted", "Base models that somebody asks for.", it.samplers_wanted)
        yield _by("hone_processes", "Runners, keepers and other processes alive.", "kind", it.processes)


def _by(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _version() -> str:
    try:
        return version("hone-rft")
    except PackageNotFoundError:
        return "source"


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    held: Metrics = request.app.state.metrics
    return Response(await held.text(), media_type=CONTENT_TYPE_LATEST)
