"""What `hone doctor` says of secrets: do the keys at hand open what the rows hold, and know the API keys.

Does not cover: making or changing keys (`hone keys`). Looking makes none: a key file that is made beside sealed rows
would hide that the right one is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.cli.findings import Finding, Verdict

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.core.settings import Settings
    from app.jobs.headers import Vault as Opener

NEW_KEY = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"


@dataclass(frozen=True)
class Stored:
    """What needs a secret: methods of jobs that have not ended, secrets of endpoints in use, digests of live keys."""

    methods: Sequence[tuple[str, dict[str, Any]]] = ()
    endpoints: Sequence[tuple[str, str]] = ()
    digests: Sequence[str] = ()


class _NoKey:
    """Opens nothing: whatever is sealed is found by it."""

    def seal(self, value: str, context: str) -> str:
        return value

    def open(self, sealed: str, context: str) -> str:
        from app.security.vault import VaultError

        raise VaultError("there is no key")


def read(connection: Connection, limit: int) -> Stored:
    """At most `limit` jobs and endpoints, the newest."""
    from sqlalchemy import select

    from app.core.states import TERMINAL
    from app.db.tables import ApiKey, Job, WebhookEndpoint

    jobs = select(Job.id, Job.method).where(Job.status.not_in(TERMINAL)).order_by(Job.created_at.desc())
    endpoints = select(WebhookEndpoint.id, WebhookEndpoint.secret).where(WebhookEndpoint.disabled_at.is_(None))
    newest = endpoints.order_by(WebhookEndpoint.created_at.desc())
    return Stored(
        [(job_id, method) for job_id, method in connection.execute(jobs.limit(limit))],
        [(endpoint_id, secret) for endpoint_id, secret in connection.execute(newest.limit(limit))],
        connection.scalars(select(ApiKey.digest).where(ApiKey.revoked_at.is_(None))).all(),
    )


def findings(settings: Settings, stored: Stored) -> Iterator[Finding]:
    yield sealed(settings, stored)
    yield keys(settings, stored.digests)


def sealed(settings: Settings, stored: Stored) -> Finding:
    """Headers of jobs and secrets of endpoints, each opened once."""
    from app.security.vault import KEY_FILE, SETTING, VaultError, load_vault

    secret = settings.secret_key.get_secret_value() if settings.secret_key else None
    path = settings.root / KEY_FILE
    what = SETTING if secret else str(path)
    opener: Opener = _NoKey()
    if secret or path.exists():
        try:
            opener = load_vault(secret, settings.root)
        except VaultError as error:
            fix = f"make one: {NEW_KEY}" if secret else f"chmod 600 {path}"
            return Finding("secrets", Verdict.PROBLEM, str(error), fix)
        except (OSError, ValueError) as error:
            detail = f"{path} cannot be read ({type(error).__name__})"
            return Finding("secrets", Verdict.PROBLEM, detail, f"chown $(id -u) {path}, or put a backup of it there")
    closed = [row_id for row_id, opens in _tries(opener, stored) if not opens]
    total = len(stored.methods) + len(stored.endpoints)
    if closed:
        detail = f"{what} does not open {len(closed)} of {total} rows, such as {closed[0]}"
        if isinstance(opener, _NoKey):
            detail = f"{path} is missing, and {len(closed)} rows are sealed, such as {closed[0]}"
        fix = f"put the key back that they were sealed with: {path} of the old host or backup, or {SETTING}=NEW,OLD"
        return Finding("secrets", Verdict.PROBLEM, detail, fix)
    if isinstance(opener, _NoKey):
        return Finding("secrets", Verdict.OK, f"nothing is sealed yet; {path} is made at first use")
    return Finding("secrets", Verdict.OK, f"{what} opens all that is sealed ({total} rows looked at)")


def _tries(opener: Opener, stored: Stored) -> Iterator[tuple[str, bool]]:
    from app.jobs.headers import open_headers
    from app.security.vault import VaultError

    for row_id, method in stored.methods:
        try:
            open_headers(method, opener, row_id)
            yield row_id, True
        except VaultError:
            yield row_id, False
    for row_id, secret in stored.endpoints:
        try:
            opener.open(secret, row_id)
            yield row_id, True
        except VaultError:
            yield row_id, False


def keys(settings: Settings, digests: Sequence[str]) -> Finding:
    """API keys are hashed with a secret too: under another one nobody is let in."""
    from app.security.api_keys import SECRET_FILE, KeyRing, load_peppers

    if not digests:
        return Finding("keys", Verdict.WARNING, "none: nobody can call the API", "hone keys create NAME")
    path = settings.root / SECRET_FILE
    again = "or make new keys: hone keys create NAME"
    if settings.secret_key is None and not path.exists():
        detail = f"{path} is missing: none of {len(digests)} API keys is known without it"
        return Finding("keys", Verdict.PROBLEM, detail, f"put it back from the old host or a backup, {again}")
    try:
        known = {digest.partition(".")[0] for digest in KeyRing(load_peppers(settings)).digests("")}
    except OSError as error:
        return Finding("keys", Verdict.PROBLEM, f"{path}: {error.strerror}", f"chown $(id -u) {path}")
    foreign = sum(digest.partition(".")[0] not in known for digest in digests)
    if not foreign:
        return Finding("keys", Verdict.OK, f"{len(digests)} in use")
    verdict = Verdict.PROBLEM if foreign == len(digests) else Verdict.WARNING
    detail = f"{foreign} of {len(digests)} API keys were made with another secret and are refused"
    return Finding("keys", verdict, detail, f"put back the {SECRET_FILE} or HONE_SECRET_KEY of then, {again}")
