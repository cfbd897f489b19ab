"""Standard Webhooks: secrets, and the three headers of a signed request.

Does not cover: verifying, which is the receiver's part (`openai.OpenAI(webhook_secret=…).webhooks.unwrap` does it).
Source: the Standard Webhooks specification, symmetric scheme `v1`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence

SECRET_PREFIX = "whsec_"
_SECRET_BYTES = 32  # the specification asks for 24 to 64


def new_secret() -> str:
    """`whsec_` and 32 random bytes in base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def headers(event_id: str, at: float, body: bytes, secret_keys: Sequence[str]) -> dict[str, str]:
    """The headers for an attempt at `at` (receivers refuse what is minutes old), one signature per secret."""
    stamp = str(int(at))
    content = f"{event_id}.{stamp}.".encode() + body
    return {
        "webhook-id": event_id,
        "webhook-timestamp": stamp,
        "webhook-signature": " ".join(f"v1,{_sign(secret, content)}" for secret in secret_keys),
    }


def _sign(secret: str, content: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    return base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
