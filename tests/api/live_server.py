"""What the API fixtures hand to tests, importable for its types.

Does not cover: starting it, see `conftest`.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.core.roles import Role
from app.core.settings import Settings
from app.db.engine import Database
from app.security.api_keys import KeyRing, load_peppers


@dataclass(frozen=True)
class LiveServer:
    """`url` has no /v1; `base_url` is what the OpenAI client takes."""

    url: str
    settings: Settings
    api_key: str

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


async def create_key(settings: Settings, project_id: str = "proj_default", role: Role = Role.RUN) -> str:
    """One more API key, for tests with two projects."""
    database = Database(settings.database)
    async with database.begin() as session:
        key = await KeyRing(load_peppers(settings)).create(session, "test", project_id, role)
    await database.close()
    return key
