"""Secrets at rest: header values are sealed before they reach the database and opened only to be sent.

Does not cover: API keys, which are never stored in a form that can be read back (`app.security.api_keys`).

AES-256-GCM with a fresh nonce each time; the row's id is bound as associated data, so a sealed value that is copied to
another row does not open there. The token names its key: of `HONE_SECRET_KEY=new,old` the first seals and all open.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_FILE = "secret.key"
SETTING = "HONE_SECRET_KEY"
MIN_SECRET_CHARS = 32
_VERSION = "v1"
_NONCE_BYTES = 12


class VaultError(Exception):
    """A key that cannot be used, or a token that does not open. Never holds a key, a token or a plain text."""


class Vault:
    """Seals with the first secret, opens with any of them."""

    def __init__(self, secret_keys: Sequence[str]) -> None:
        if not secret_keys:
            raise VaultError(f"no secret key; set {SETTING}")
        if any(len(secret) < MIN_SECRET_CHARS for secret in secret_keys):
            raise VaultError(f"{SETTING} must have at least {MIN_SECRET_CHARS} characters, best random ones")
        keys = [_derive(secret) for secret in secret_keys]
        self._ring = _key_id(keys[0]), {_key_id(key): AESGCM(key) for key in keys}  # one value: threads see old or new

    @property
    def keys(self) -> int:
        """How many keys open; more than one while a rotation is under way."""
        return len(self._ring[1])

    def seal(self, plaintext: str, context: str) -> str:
        """An ASCII token for `plaintext` that opens only with the same `context` (the id of its row)."""
        current, ciphers = self._ring
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = ciphers[current].encrypt(nonce, plaintext.encode(), context.encode())
        return f"{_VERSION}.{current}.{base64.urlsafe_b64encode(nonce + sealed).decode()}"

    def open(self, token: str, context: str) -> str:
        """The plain text. Raises VaultError for a foreign key, another context, or a changed token."""
        version, _, rest = token.partition(".")
        key_id, _, body = rest.partition(".")
        if version != _VERSION or not body:
            raise VaultError("not a sealed value")
        cipher = self._ring[1].get(key_id)
        if cipher is None:
            raise VaultError(f"sealed with the key {key_id!r}, which is not in {SETTING} or the key file")
        try:
            raw = base64.b64decode(body, altchars=b"-_", validate=True)
            return cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], context.encode()).decode()
        except (ValueError, InvalidTag):
            raise VaultError("the sealed value was changed, or belongs to another row") from None

    def is_current(self, token: str) -> bool:
        """False when `token` should be sealed again because its key was rotated out of first place."""
        return token.startswith(f"{_VERSION}.{self._ring[0]}.")


class FileVault(Vault):
    """Keys from a file, which is read again when a rotation replaced it: a process may live longer than its keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._state()
        super().__init__(path.read_text(encoding="ascii").split())

    def seal(self, plaintext: str, context: str) -> str:
        self._follow()
        return super().seal(plaintext, context)

    def open(self, token: str, context: str) -> str:
        self._follow()
        return super().open(token, context)

    def is_current(self, token: str) -> bool:
        self._follow()
        return super().is_current(token)

    def _follow(self) -> None:
        state = self._state()
        if state != self._seen:
            super().__init__(self._path.read_text(encoding="ascii").split())
            self._seen = state  # at worst older than what was read: then the next call reads once more

    def _state(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise VaultError(f"{self._path} cannot be read: {error.strerror}") from None
        if found.st_mode & 0o077:
            raise VaultError(f"{self._path} can be read by others; run: chmod 600 {self._path}")
        return found.st_ino, found.st_mtime_ns, found.st_size


def load_vault(secret_key: str | None, data_dir: Path) -> Vault:
    """The vault of this installation: keys from the setting (newest first, separated by commas), else the key file.

    The key file is made on first use with mode 0600; several processes that start together agree on one.
    Raises VaultError.
    """
    if secret_key:
        return Vault([part.strip() for part in secret_key.split(",") if part.strip()])
    path = data_dir / KEY_FILE
    if not path.exists():
        _create(path)
    return FileVault(path)


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike rename, this keeps the file of a process that was faster
    except FileExistsError:
        return
    finally:
        draft.unlink()


def _derive(secret: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=b"hone vault v1").derive(secret.encode())


def _key_id(key: bytes) -> str:
    return hashlib.sha256(b"hone key id" + key).hexdigest()[:8]
