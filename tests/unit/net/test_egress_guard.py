"""Which addresses a user's URL may reach, and that only judged addresses are dialled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import httpcore
import httpx
import pytest

from app.net.clients import GuardedTransport, GuardUnavailable, guarded_client, operator_client
from app.net.guard import EgressDenied, EgressPolicy, EgressPolicyError, GuardedBackend, SocketOption
from tests.unit.net.user_endpoint import Reply, UserEndpoint

PRIVATE_URLS = [
    "http://127.0.0.1/",
    "http://localhost/",
    "http://0.0.0.0/",
    "http://0x7f.1/",
    "http://2130706433/",
    "http://0177.1/",
    "http://[::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://169.254.169.254/latest/meta-data",
    "http://100.64.0.1/",
    "http://10.1.2.3/",
    "http://192.168.0.1/",
    "http://172.16.0.1/",
    "http://[fd00::1]/",
    "http://[fe80::1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::a00:1]/",
    "http://[64:ff9b:1:a00:0:500:808:808]/",
    "http://[2002:7f00:1::]/",
    "http://[::127.0.0.1]/",
    "http://[2001:0:7f00:1::]/",
    "http://224.0.0.1/",
    "http://[ff02::1]/",
    "http://[fec0::1]/",
    "http://255.255.255.255/",
]


class Wire(httpcore.AsyncNetworkBackend):
    """Records what is dialled; no packet leaves."""

    def __init__(self, refuse: Sequence[str] = ()) -> None:
        self.dialled: list[tuple[str, int]] = []
        self._refuse = refuse

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.dialled.append((host, port))
        if host in self._refuse:
            raise httpcore.ConnectError("refused")
        return httpcore.AsyncMockStream([b"HTTP/1.1 204 No Content\r\n\r\n"])


class Names:
    """A resolver whose answers change with each look-up; the last one stays."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def client(names: Names, wire: Wire, allow: str = "") -> httpx.AsyncClient:
    policy = EgressPolicy.parse(allow)
    return guarded_client(policy, timeout_s=5, backend=GuardedBackend(policy, resolve=names, inner=wire))


@pytest.mark.parametrize("url", PRIVATE_URLS)
async def test_no_form_of_a_private_address_is_dialled(url: str) -> None:
    policy, wire = EgressPolicy(), Wire()
    async with guarded_client(policy, timeout_s=5, backend=GuardedBackend(policy, inner=wire)) as http:
        with pytest.raises(EgressDenied, match="HONE_EGRESS_ALLOW"):
            await http.get(url)
    assert wire.dialled == []


async def test_a_public_address_is_dialled_as_it_was_judged() -> None:
    wire = Wire()
    async with client(Names(["93.184.215.14"]), wire) as http:
        assert (await http.get("http://example.org/")).status_code == 204
    assert wire.dialled == [("93.184.215.14", 80)]


async def test_a_name_that_turns_private_is_refused_at_its_second_dial() -> None:
    wire = Wire()
    async with client(Names(["93.184.215.14"], ["127.0.0.1"]), wire) as http:
        await http.get("http://rebind.test/", headers={"Connection": "close"})
        with pytest.raises(EgressDenied):
            await http.get("http://rebind.test/")
    assert wire.dialled == [("93.184.215.14", 80)]


async def test_one_private_address_among_public_ones_refuses_the_name() -> None:
    wire = Wire()
    async with client(Names(["93.184.215.14", "10.0.0.1"]), wire) as http:
        with pytest.raises(EgressDenied) as denied:
            await http.get("http://mixed.test/")
    assert denied.value.address == "10.0.0.1"
    assert wire.dialled == []


async def test_the_next_judged_address_is_tried_when_one_refuses() -> None:
    wire = Wire(refuse=["2606:2800:220:1::1"])
    async with client(Names(["2606:2800:220:1::1", "93.184.215.14"]), wire) as http:
        assert (await http.get("http://example.org/")).status_code == 204
    assert [host for host, _ in wire.dialled] == ["2606:2800:220:1::1", "93.184.215.14"]


@pytest.mark.parametrize(
    ("allow", "url", "address"),
    [
        ("127.0.0.1:8765", "http://127.0.0.1:8765/", "127.0.0.1"),
        ("127.0.0.1:8765", "http://localhost:8765/", "127.0.0.1"),
        ("127.0.0.0/8:*", "http://127.9.9.9:1/", "127.9.9.9"),
        ("10.0.0.0/8", "http://10.2.3.4:81/", "10.2.3.4"),
        ("tools.internal:443, 10.0.0.0/8:80", "http://10.2.3.4/", "10.2.3.4"),
        ("tools.internal:81", "http://Tools.Internal.:81/", "192.168.1.1"),
        ("[::1]:80", "http://[::1]/", "::1"),
        ("fd00::/8:443", "http://[fd00::2]:443/", "fd00::2"),
        ("127.0.0.1:80", "http://[::ffff:7f00:1]/", "::ffff:127.0.0.1"),
    ],
)
async def test_an_entry_of_the_allow_list_opens_its_target(allow: str, url: str, address: str) -> None:
    wire = Wire()
    async with client(Names([address]), wire, allow) as http:
        assert (await http.get(url)).status_code == 204


@pytest.mark.parametrize(
    ("allow", "url", "address"),
    [
        ("127.0.0.1:8765", "http://127.0.0.1:8766/", "127.0.0.1"),
        ("127.0.0.1:8765", "http://127.0.0.2:8765/", "127.0.0.2"),
        ("tools.internal:443", "http://tools.internal:80/", "10.0.0.1"),
        ("tools.internal:80", "http://other.internal/", "10.0.0.1"),
        ("127.0.0.1:80", "http://[2001:0:7f00:1:0:0:f5ff:fffe]/", "2001:0:7f00:1:0:0:f5ff:fffe"),
    ],
)
async def test_an_entry_opens_nothing_else(allow: str, url: str, address: str) -> None:
    async with client(Names([address]), Wire(), allow) as http:
        with pytest.raises(EgressDenied):
            await http.get(url)


@pytest.mark.parametrize("text", ["127.0.0.1", "tools.internal", "a:b", "a:0", "a:70000", "*:80", "[::1]80", "x/8:80"])
def test_an_unreadable_entry_names_itself(text: str) -> None:
    with pytest.raises(EgressPolicyError, match="HONE_EGRESS_ALLOW"):
        EgressPolicy.parse(f"10.0.0.0/8, {text}")


async def test_only_http_and_https_are_spoken() -> None:
    async with client(Names(["93.184.215.14"]), Wire()) as http:
        with pytest.raises(httpx.UnsupportedProtocol):
            await http.get("ftp://example.org/")


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch, endpoint: UserEndpoint) -> None:
    monkeypatch.setenv("HTTP_PROXY", endpoint.url)
    monkeypatch.setenv("ALL_PROXY", endpoint.url)
    wire = Wire()
    async with client(Names(["93.184.215.14"]), wire) as http:
        await http.get("http://example.org/")
    assert wire.dialled == [("93.184.215.14", 80)]
    async with operator_client(timeout_s=5) as http:
        assert not http._mounts


async def test_a_redirect_is_an_answer_and_is_not_followed(http: httpx.AsyncClient, endpoint: UserEndpoint) -> None:
    endpoint.plays(Reply(302, headers={"Location": endpoint.url}))
    assert (await http.get(endpoint.url)).status_code == 302
    assert len(endpoint.seen) == 1


async def test_a_socket_file_is_never_dialled() -> None:
    with pytest.raises(EgressDenied):
        await GuardedBackend(EgressPolicy(), inner=Wire()).connect_unix_socket("/run/docker.sock")


def test_httpx_still_keeps_its_network_backend_where_the_guard_replaces_it() -> None:
    """If this fails after an upgrade, `GuardedTransport` must be fitted to the new httpx before it is used."""
    transport = httpx.AsyncHTTPTransport(trust_env=False)
    assert isinstance(transport._pool, httpcore.AsyncConnectionPool)
    assert isinstance(transport._pool._network_backend, httpcore.AsyncNetworkBackend)
    guard = GuardedBackend(EgressPolicy())
    guarded = GuardedTransport(guard, httpx.Limits())
    assert guarded._pool.create_connection(httpcore.URL("http://a/").origin)._network_backend is guard  # type: ignore[attr-defined,union-attr]


def test_without_that_seam_no_client_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_pool(self: httpx.AsyncHTTPTransport, **_: object) -> None:
        self._pool = object()  # type: ignore[assignment]

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "__init__", without_pool)
    with pytest.raises(GuardUnavailable):
        guarded_client(EgressPolicy(), timeout_s=1)
