"""TLS over the guarded network: the certificate is checked against the name in the URL, not the dialled address."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.net import clients
from app.net.guard import EgressPolicy, GuardedBackend


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate for tools.test, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tools.test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("tools.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "tools.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


@pytest.fixture
async def port(certificate: Path) -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
def company_authority(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    clients._tls_context.cache_clear()
    yield
    clients._tls_context.cache_clear()


async def loopback(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


async def status(host: str, port: int) -> int:
    policy = EgressPolicy.parse("127.0.0.1:*")
    backend = GuardedBackend(policy, resolve=loopback)
    async with clients.guarded_client(policy, timeout_s=5, backend=backend) as http:
        return (await http.get(f"https://{host}:{port}/")).status_code


@pytest.mark.usefixtures("company_authority")
async def test_the_name_of_the_url_is_what_the_certificate_must_carry(port: int) -> None:
    assert await status("tools.test", port) == 204
    with pytest.raises(httpx.ConnectError, match=r"other\.test"):
        await status("other.test", port)


async def test_an_unknown_authority_is_refused(port: int) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await status("tools.test", port)
