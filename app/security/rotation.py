"""Every sealed value again under the newest key, so that the older ones can be taken away.

Does not cover: API keys, which cannot be read back; each moves to the newest secret by its next use (`KeyRing.renew`).

Safe to stop and to run again at any moment: a value is current or it is not, and old keys go last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import InstrumentedAttribute

from app.db.engine import Database
from app.db.tables import Base, Job, WebhookEndpoint
from app.jobs.headers import Vault as Sealer
from app.jobs.headers import seal_headers
from app.security.key_file import add_key, drop_old_keys, only_rotation
from app.security.vault import KEY_FILE, Vault, VaultError, load_vault

BATCH = 50  # rows a transaction: a writer on SQLite waits for no more than these
SETTLE_S = 50.0  # above what lies between sealing a value and writing it: 30 s for a connection, 10 for the lock


class _Resealer:
    """Takes the place of a vault where values are sealed: what comes in is a token, and so is what goes out."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def seal(self, token: str, context: str) -> str:
        if self._vault.is_current(token):
            return token
        return self._vault.seal(self._vault.open(token, context), context)

    def open(self, sealed: str, context: str) -> str:
        return sealed


def _one(token: str | None, sealer: Sealer, row_id: str) -> str | None:
    return None if token is None else sealer.seal(token, row_id)


@dataclass(frozen=True)
class _Sealed:
    """A column that holds sealed values, and how to seal what is in one of its cells."""

    table: type[Base]
    id: InstrumentedAttribute[str]
    column: InstrumentedAttribute[Any]
    seal: Callable[[Any, Sealer, str], Any]


SEALED = (
    _Sealed(Job, Job.id, Job.method, seal_headers),
    _Sealed(WebhookEndpoint, WebhookEndpoint.id, WebhookEndpoint.secret, _one),
    _Sealed(WebhookEndpoint, WebhookEndpoint.id, WebhookEndpoint.old_secret, _one),
)


@dataclass(frozen=True)
class Resealed:
    """rows: how many were written; unreadable: the ids of those that no key we have opens, left as they were."""

    rows: int
    unreadable: tuple[str, ...]


async def reseal(database: Database, vault: Vault) -> Resealed:
    """One pass over all sealed values."""
    rows, unreadable = 0, []
    for sealed in SEALED:
        last: str | None = ""
        while last is not None:
            last, written, failed = await _batch(database, sealed, _Resealer(vault), last)
            rows += written
            unreadable += failed
    return Resealed(rows, tuple(unreadable))


async def _batch(
    database: Database, sealed: _Sealed, resealer: _Resealer, after: str
) -> tuple[str | None, int, list[str]]:
    """The last id seen (None: no rows left), the rows written, the ids that did not open."""
    page = select(sealed.id, sealed.column).where(sealed.id > after).order_by(sealed.id).limit(BATCH)
    written, failed, last = 0, [], None
    async with database.begin() as session:
        for row_id, value in (await session.execute(page.with_for_update())).all():
            last = row_id
            try:
                current = sealed.seal(value, resealer, row_id)
            except VaultError:
                failed.append(row_id)
                continue
            if current != value:
                changed = update(sealed.table).where(sealed.id == row_id).values({sealed.column: current})
                await session.execute(changed.execution_options(synchronize_session=False))
                written += 1
    return last, written, failed


async def rotate_key_file(
    database: Database, data_dir: Path, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> Resealed:
    """A new key into the key file, every value under it, the old key out. Raises VaultError.

    The old key stays when a value did not open. Two passes: between them whoever sealed with the old key just before
    it left first place has written what it sealed.
    """
    path = data_dir / KEY_FILE
    with only_rotation(data_dir):
        load_vault(None, data_dir)  # makes the file, or says what is wrong with it
        await asyncio.to_thread(add_key, path)
        vault = load_vault(None, data_dir)
        first = await reseal(database, vault)
        await sleep(SETTLE_S)
        second = await reseal(database, vault)
        if not second.unreadable:
            await asyncio.to_thread(drop_old_keys, path)
    return Resealed(first.rows + second.rows, second.unreadable)
