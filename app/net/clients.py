"""The two HTTP clients of the service: one for URLs that users send, one for URLs that the operator configured.

Does not cover: what is sent over them; retries and body limits of users' endpoints live in `app.net.exchange`.
This room alone imports httpx; the names below are what the rest of the service may use of it.
"""

from __future__ import annotations

import functools
import ssl
from http.cookiejar import CookieJar, DefaultCookiePolicy

import certifi
import httpcore
import httpx

from app.net.guard import EgressDenied, EgressPolicy, GuardedBackend
from app.net.shards import ShardedTransport

HttpClient = httpx.AsyncClient
HttpLimits = httpx.Limits
HttpResponse = httpx.Response
InvalidURL = httpx.InvalidURL
TransportError = httpx.TransportError
TimeoutException = httpx.TimeoutException

CONNECT_TIMEOUT_S = 5.0
USER_CONNECTIONS = 512  # to users' endpoints, of one client

__all__ = [
    "CONNECT_TIMEOUT_S",
    "USER_CONNECTIONS",
    "EgressDenied",
    "EgressPolicy",
    "HttpClient",
    "HttpLimits",
    "HttpResponse",
    "InvalidURL",
    "TimeoutException",
    "TransportError",
    "guarded_client",
    "operator_client",
]


class GuardUnavailable(RuntimeError):
    """The installed httpx no longer has the seam that the egress guard needs; refuse to run without the guard."""


class GuardedTransport(httpx.AsyncHTTPTransport):
    """httpx's own transport over a pool that dials through the egress guard, for http and https only."""

    def __init__(self, backend: httpcore.AsyncNetworkBackend, limits: httpx.Limits) -> None:
        super().__init__(verify=_tls_context(), trust_env=False, limits=limits)
        pool = getattr(self, "_pool", None)
        if not isinstance(pool, httpcore.AsyncConnectionPool) or not hasattr(pool, "_network_backend"):
            raise GuardUnavailable("httpx/httpcore changed where the connection pool keeps its network backend")
        pool._network_backend = backend

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send, unless the scheme could mean anything but HTTP."""
        if request.url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"scheme {request.url.scheme!r} is not http or https", request=request)
        return await super().handle_async_request(request)


def guarded_client(
    policy: EgressPolicy,
    *,
    timeout_s: float,
    max_connections: int = USER_CONNECTIONS,
    backend: httpcore.AsyncNetworkBackend | None = None,
) -> httpx.AsyncClient:
    """A client for users' URLs: egress guard, no proxies from the environment, no redirects, no compression.

    timeout_s bounds each read and write; the connect limit is the smaller of it and 5 s. A refused destination raises
    EgressDenied. `backend` replaces the guarded network in tests.
    """
    guard = backend or GuardedBackend(policy)
    return httpx.AsyncClient(
        transport=ShardedTransport(lambda limits: GuardedTransport(guard, limits), max_connections),
        timeout=_timeout(timeout_s),
        trust_env=False,
        follow_redirects=False,
        cookies=_no_cookies(),
        # A compressed megabyte can unpack to a gigabyte inside one chunk, before any cap sees it.
        headers={"Accept-Encoding": "identity", "User-Agent": "hone"},
    )


def operator_client(*, timeout_s: float, max_connections: int = 1000) -> httpx.AsyncClient:
    """A client for the operator's own URLs (samplers, judges): unguarded, no proxies from the environment."""
    return httpx.AsyncClient(
        transport=ShardedTransport(_open_transport, max_connections),
        timeout=_timeout(timeout_s),
        trust_env=False,
        follow_redirects=False,
        cookies=_no_cookies(),
        headers={"User-Agent": "hone"},
    )


def _open_transport(limits: httpx.Limits) -> httpx.AsyncHTTPTransport:
    return httpx.AsyncHTTPTransport(verify=_tls_context(), trust_env=False, limits=limits)


def _no_cookies() -> CookieJar:
    """Keeps none: a client serves all rollouts of a job, or all projects, which a server would take for one session."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


def _timeout(timeout_s: float) -> httpx.Timeout:
    # A turn is waited for as long as an answer: hundreds of calls start together at the start of a step.
    return httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Certifi's roots plus the system's (and SSL_CERT_FILE), so that a company's own authority works."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    return context
