"""The egress guard: which addresses a user's URL may reach, enforced where the connection is dialled.

Does not cover: retries and size limits (`app.net.exchange`); operator URLs, which are not guarded at all (`clients`).

A name is resolved once, every address of the answer is judged, and exactly the judged addresses are dialled, so a
second look-up cannot answer differently (DNS rebinding). TLS goes over that connection with the original host name.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

import httpcore

SETTING = "HONE_EGRESS_ALLOW"
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]

_GLOBAL_UNICAST = IPv6Network("2000::/3")
# Prefixes whose last 32 bits are an IPv4 address that a gateway or the kernel may unwrap: compatible, NAT64. That of
# local NAT64s (64:ff9b:1::/48) may keep it in other bits (RFC 6052 §2.2): no address in there is taken for public.
_TAIL_IS_IPV4 = (IPv6Network("::/96"), IPv6Network("64:ff9b::/96"))


class EgressDenied(Exception):
    """A user's URL leads to an address that is neither public nor allowed by the operator. Never worth a retry."""

    def __init__(self, target: str, address: str, reason: str = "is not a public address") -> None:
        self.target = target  # host:port, never the whole URL: a path or query may hold a secret
        self.address = address
        literal = target.startswith((f"{address}:", f"[{address}]")) or target == address
        where = target if literal else f"{target} ({address})"
        super().__init__(f"{where} {reason}; the operator can allow it by adding {target} to {SETTING}")


class EgressPolicyError(ValueError):
    """An entry of the allow-list cannot be read."""


@dataclass(frozen=True)
class AllowEntry:
    """One allowed destination. Either `network` or `name` is set; `port` None means every port."""

    network: Network | None
    name: str | None
    port: int | None

    def admits(self, host: str, address: Address, port: int) -> bool:
        """True when dialling `address`:`port` for a URL that says `host` is covered by this entry."""
        if self.port is not None and self.port != port:
            return False
        if self.network is not None:
            return address.version == self.network.version and address in self.network
        return self.name == host


@dataclass(frozen=True)
class EgressPolicy:
    """Public addresses are open; everything else only by an entry. The default allows nothing private."""

    allow: tuple[AllowEntry, ...] = ()

    @classmethod
    def parse(cls, text: str) -> EgressPolicy:
        """Read `host:port`, `CIDR`, `CIDR:port`, `[v6]:port`, separated by commas. A port of `*` means all ports.

        An address or name without a port is refused, so that a list never opens more than its author wrote down; a
        CIDR with a prefix length may stand alone. Raises EgressPolicyError naming the entry.
        """
        return cls(tuple(_entry(part.strip()) for part in text.split(",") if part.strip()))

    def check(self, host: str, address: str, port: int) -> None:
        """Raise EgressDenied unless `address`, in every unwrapped form, is public or allowed for this port."""
        name = host.rstrip(".").lower()
        outer = ip_address(address.partition("%")[0])
        if self._admits(name, outer, port):
            return
        if not all(_is_public(form) or self._admits(name, form, port) for form in (outer, *_inner(outer))):
            shown = f"[{host}]" if ":" in host else host
            raise EgressDenied(f"{shown}:{port}", address)

    def _admits(self, host: str, address: Address, port: int) -> bool:
        return any(entry.admits(host, address, port) for entry in self.allow)


def _entry(text: str) -> AllowEntry:
    host, port_text = text, ""
    if text.startswith("["):
        host, _, tail = text[1:].partition("]")
        if tail and not tail.startswith(":"):
            raise EgressPolicyError(f"{SETTING}: {text!r}: a port follows the bracket as ]:port")
        port_text = tail[1:]
    elif text.count(":") == 1:
        host, _, port_text = text.partition(":")
    elif "/" in text and ":" in text.rsplit("/", 1)[1]:  # fd00::/8:443
        host, _, port_text = text.rpartition(":")
    port = _port(port_text, text)
    try:
        network = ip_network(host, strict=False)
    except ValueError:
        network = None
    if not port_text and (network is None or "/" not in host):
        raise EgressPolicyError(f"{SETTING}: {text!r} has no port; write {text}:PORT or {text}:*")
    if network is None and (not host or "/" in host or "*" in host or any(c.isspace() for c in host)):
        raise EgressPolicyError(f"{SETTING}: {text!r} is neither an address, a CIDR nor a host name")
    return AllowEntry(network=network, name=None if network else host.rstrip(".").lower(), port=port)


def _port(text: str, entry: str) -> int | None:
    if text in ("", "*"):
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise EgressPolicyError(f"{SETTING}: {entry!r}: the port must be a number from 1 to 65535, or *")
    return int(text)


def _inner(address: Address) -> tuple[IPv4Address, ...]:
    """The IPv4 addresses that hide in an IPv6 one."""
    if isinstance(address, IPv4Address):
        return ()
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if any(address in prefix for prefix in _TAIL_IS_IPV4):
        found.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return tuple(inner for inner in found if inner is not None)


def _is_public(address: Address) -> bool:
    if address.is_multicast or address.is_unspecified:
        return False
    if isinstance(address, IPv4Address):
        return address.is_global
    # Wrapped forms (::/96, mapped, NAT64) stand outside 2000::/3 and are judged by what they hold.
    wrapped = address.ipv4_mapped is not None or any(address in prefix for prefix in _TAIL_IS_IPV4)
    return wrapped or (address.is_global and address in _GLOBAL_UNICAST)


async def system_resolver(host: str, port: int) -> Sequence[str]:
    """Addresses of `host` in the order of the system's resolver, each once."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """A network backend for httpcore that dials only what the policy admits.

    `resolve` and `inner` are parameters so that a test can answer and observe; production passes neither.
    """

    def __init__(
        self,
        policy: EgressPolicy,
        *,
        resolve: Resolver = system_resolver,
        inner: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._policy = policy
        self._resolve = resolve
        self._inner = inner or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, judge every address, then try the judged ones in order within `timeout` seconds overall."""
        until = None if timeout is None else time.monotonic() + timeout
        addresses = await self._addresses(host, port, timeout)
        for address in addresses:
            self._policy.check(host, address, port)
        last: Exception | None = None
        for index, address in enumerate(addresses):
            share = None
            if until is not None:
                # An unreachable family must not eat the time of the next: all but the last get half of what is left.
                left = max(until - time.monotonic(), 0.001)
                share = left if index == len(addresses) - 1 else left / 2
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout=share, local_address=local_address, socket_options=socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        raise last or httpcore.ConnectError(f"{host} has no address")

    async def _addresses(self, host: str, port: int, timeout: float | None) -> Sequence[str]:
        try:
            async with asyncio.timeout(timeout):
                return await self._resolve(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"no answer from the resolver for {host}") from error
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"cannot resolve {host}: {error}") from error

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[SocketOption] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Always refused: no URL of a user leads to a socket file."""
        raise EgressDenied(path, path, "is a local socket")

    async def sleep(self, seconds: float) -> None:
        """Part of httpcore's interface (its own connect retries, which stay off)."""
        await asyncio.sleep(seconds)
