"""The table of grader kinds, and the way from a spec to a grader.

Does not cover: what a kind does. This is the only place that knows them all: a new kind is a module and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.graders.base import Grader, GraderSpec, Workshop
from app.graders.endpoint import EndpointSpec
from app.graders.multi import MultiSpec
from app.graders.string_check import StringCheckSpec
from app.net.clients import HttpClient
from app.net.endpoint import Mask
from app.net.exchange import Retry

KINDS: Mapping[str, type[GraderSpec]] = {
    "endpoint": EndpointSpec,
    "multi": MultiSpec,
    "string_check": StringCheckSpec,
}


def build_grader(
    spec: GraderSpec, http: HttpClient, *, timeout_s: float, retry: Retry | None = None, mask: Mask | None = None
) -> Grader:
    """The grader of a job. `http` is the guarded client; timeout_s bounds one attempt at an endpoint.

    mask: for secrets of the job beside the grader's own, which are masked in any case.
    """
    known = (mask or Mask()) | Mask.of(*spec.secrets())
    return spec.build(Workshop(http=http, timeout_s=timeout_s, retry=retry or Retry(), mask=known))
