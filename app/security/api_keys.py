"""API keys: made once, shown once, stored as HMAC-SHA256 with a secret that never enters the database.

Does not cover: what a role allows (`app.web.deps`), nor the secret headers of tools (`app.security.vault`).
A slow hash is for passwords; against 256 random bits it only costs every request its time (control plane §4.3).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import NotFound
from app.core.ids import new_id
from app.core.roles import Role
from app.core.settings import Settings
from app.db.engine import now
from app.db.tables import DEFAULT_PROJECT, ApiKey

PREFIX = "sk-hone-"
SECRET_FILE = "api_keys.secret"
_CHECK_CHARS = 6


@dataclass(frozen=True)
class Caller:
    """Who asks: the project that everything is scoped to, the key for the log, and what it may do.

    stale: the key is stored under a secret that was rotated out of first place; `KeyRing.renew` mends that.
    """

    project_id: str
    key_id: str
    role: Role
    stale: bool = False


def new_key() -> str:
    """`sk-hone-`, 32 random bytes, and a checksum so that a mistyped key is refused without a look-up."""
    body = secrets.token_urlsafe(32)
    return f"{PREFIX}{body}{_checksum(body)}"


def well_formed(key: str) -> bool:
    body, check = key.removeprefix(PREFIX)[:-_CHECK_CHARS], key[-_CHECK_CHARS:]
    return key.startswith(PREFIX) and key.isascii() and hmac.compare_digest(_checksum(body), check)


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"[-_CHECK_CHARS:]


def load_peppers(settings: Settings) -> list[bytes]:
    """The server secrets of the HMAC: one derived from each part of `HONE_SECRET_KEY`, else a file made once (0600).

    The first digests new keys; keys digested with a later one still work, and move to the first when they are used.
    """
    if settings.secret_key is not None and settings.secret_key.get_secret_value().strip(", "):  # else: not set
        parts = [part.strip() for part in settings.secret_key.get_secret_value().split(",")]
        return [hmac.digest(part.encode(), b"hone api keys", "sha256") for part in parts if part]
    path = settings.root / SECRET_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _create_once(path, secrets.token_bytes(32))
    return [path.read_bytes()]


def _create_once(path: Path, content: bytes) -> None:
    """Complete or absent, and the first of two writers wins: a link never replaces what is there."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()


class KeyRing:
    """Creates, finds and revokes keys; knows the peppers, so it lives as long as the process."""

    def __init__(self, peppers: Sequence[bytes]) -> None:
        self._peppers = {hashlib.sha256(b"hone pepper id" + pepper).hexdigest()[:8]: pepper for pepper in peppers}
        self._current = next(iter(self._peppers))

    def digests(self, key: str) -> list[str]:
        """What a key may be stored as, `<id of the secret>.<HMAC>`; the first is what a new key is stored as."""
        return [
            f"{name}.{hmac.new(pepper, key.encode(), hashlib.sha256).hexdigest()}"
            for name, pepper in self._peppers.items()
        ]

    def is_current(self, digest: str) -> bool:
        """False for a key that stops working when the older secrets are taken away."""
        return digest.startswith(f"{self._current}.")

    async def create(
        self, session: AsyncSession, name: str, project_id: str = DEFAULT_PROJECT, role: Role = Role.RUN
    ) -> str:
        """Returns the key itself, for the only time."""
        key = new_key()
        session.add(
            ApiKey(
                id=new_id("key_"),
                project_id=project_id,
                name=name,
                role=role,
                digest=self.digests(key)[0],
                hint=f"{PREFIX}…{key[-4:]}",
                created_at=await session.scalar(select(now())),
            )
        )
        await session.flush()
        return key

    async def find(self, session: AsyncSession, key: str) -> Caller | None:
        """The caller a key stands for; None for an unknown, malformed or revoked one."""
        if not well_formed(key):
            return None
        row = (
            await session.execute(
                select(ApiKey.project_id, ApiKey.id, ApiKey.role, ApiKey.digest).where(
                    ApiKey.digest.in_(self.digests(key)), ApiKey.revoked_at.is_(None)
                )
            )
        ).one_or_none()
        if row is None:
            return None
        return Caller(row.project_id, row.id, Role(row.role), stale=not self.is_current(row.digest))

    async def renew(self, session: AsyncSession, key_id: str, key: str) -> None:
        """Store a key that was just used under the first secret, so that the older ones can go."""
        await session.execute(update(ApiKey).where(ApiKey.id == key_id).values(digest=self.digests(key)[0]))

    async def list(self, session: AsyncSession) -> Sequence[ApiKey]:
        """All keys, oldest first, revoked ones too."""
        return (await session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id))).all()

    async def stale(self, session: AsyncSession) -> Sequence[str]:
        """The ids of live keys that need an older secret until they are used."""
        return [
            key.id for key in await self.list(session) if key.revoked_at is None and not self.is_current(key.digest)
        ]

    async def revoke(self, session: AsyncSession, key_id: str) -> None:
        """From the next request on the key is refused. Raises NotFound; revoking twice is fine."""
        found = await session.scalar(select(ApiKey.id).where(ApiKey.id == key_id))
        if found is None:
            raise NotFound(f"No such API key: {key_id}. `hone keys list` shows the ids.", param="id")
        await session.execute(
            update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=now())
        )
