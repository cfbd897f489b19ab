"""A new key for every sealed value: whole, safe to stop anywhere, and followed by processes that run."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import insert, select, update

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import Job, WebhookEndpoint
from app.jobs.headers import open_headers, seal_headers
from app.security import rotation
from app.security.key_file import add_key, only_rotation
from app.security.vault import KEY_FILE, Vault, VaultError, load_vault
from tests.db.rows import METHOD, Seed

SECRET = "Bearer canary-1"


async def add_job(database: Database, vault: Vault, job_id: str) -> None:
    tool = {"name": "t", "server_url": "http://127.0.0.1:9/t", "headers": {"Authorization": SECRET}}
    method = {"type": "reinforcement", "reinforcement": {**METHOD["reinforcement"], "tools": [tool]}}
    seed = Seed(database, Settings(data_dir=Path("unused")))
    await seed.job(id=job_id, method=seal_headers(method, vault, job_id))


async def add_webhook(database: Database, vault: Vault, endpoint_id: str) -> None:
    row = {"id": endpoint_id, "project_id": "p", "url": "http://x", "events": [], "created_at": now()}
    async with database.begin() as session:
        await session.execute(insert(WebhookEndpoint).values(**row, secret=vault.seal(SECRET, endpoint_id)))


async def secrets_of(database: Database, vault: Vault) -> list[str]:
    async with database.read() as session:
        jobs = (await session.execute(select(Job.id, Job.method))).all()
        hooks = (await session.execute(select(WebhookEndpoint.id, WebhookEndpoint.secret))).all()
    opened = [open_headers(method, vault, job_id)["reinforcement"]["tools"][0]["headers"] for job_id, method in jobs]
    return [headers["Authorization"] for headers in opened] + [vault.open(token, row_id) for row_id, token in hooks]


async def at_once(_: float) -> None:
    """Nobody else writes in these tests, so nothing has to settle."""


def key_of(path: Path) -> list[str]:
    return (path / KEY_FILE).read_text().split()


async def test_every_value_opens_with_the_new_key_alone(database: Database, tmp_path: Path) -> None:
    before = load_vault(None, tmp_path)
    for number in range(rotation.BATCH + 3):
        await add_job(database, before, f"ftjob-{number:03}")
    await add_webhook(database, before, "we_1")
    [old] = key_of(tmp_path)
    done = await rotation.rotate_key_file(database, tmp_path, sleep=at_once)
    [new] = key_of(tmp_path)
    assert (done.rows, done.unreadable) == (rotation.BATCH + 4, ())
    assert new != old
    assert await secrets_of(database, Vault([new])) == [SECRET] * (rotation.BATCH + 4)
    with pytest.raises(VaultError):
        await secrets_of(database, Vault([old]))


async def test_a_process_that_runs_follows_the_file(database: Database, tmp_path: Path) -> None:
    running = load_vault(None, tmp_path)
    await add_job(database, running, "ftjob-1")
    await rotation.rotate_key_file(database, tmp_path, sleep=at_once)
    assert await secrets_of(database, running) == [SECRET]
    assert load_vault(None, tmp_path).open(running.seal("a", "r"), "r") == "a"


async def test_what_was_sealed_with_the_old_key_while_it_ran_is_found(database: Database, tmp_path: Path) -> None:
    load_vault(None, tmp_path)
    late = Vault(key_of(tmp_path))

    async def meanwhile(_: float) -> None:
        await add_job(database, late, "ftjob-late")

    await rotation.rotate_key_file(database, tmp_path, sleep=meanwhile)
    assert await secrets_of(database, Vault(key_of(tmp_path))) == [SECRET]


@pytest.mark.parametrize("dies_at", ["reseal", "drop_old_keys"])
async def test_a_rotation_that_died_is_finished_by_the_next_with_the_same_key(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    await add_job(database, load_vault(None, tmp_path), "ftjob-1")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rotation, dies_at, die)
        with pytest.raises(KeyboardInterrupt):
            await rotation.rotate_key_file(database, tmp_path, sleep=at_once)
    half = key_of(tmp_path)
    assert len(half) == 2
    assert await secrets_of(database, Vault(half)) == [SECRET]
    await rotation.rotate_key_file(database, tmp_path, sleep=at_once)
    assert key_of(tmp_path) == half[:1]
    assert await secrets_of(database, Vault(half[:1])) == [SECRET]


async def test_a_value_that_no_key_opens_is_named_and_keeps_the_old_key(database: Database, tmp_path: Path) -> None:
    await add_job(database, Vault(["lost" * 8]), "ftjob-lost")
    await add_job(database, load_vault(None, tmp_path), "ftjob-mine")
    done = await rotation.rotate_key_file(database, tmp_path, sleep=at_once)
    assert done.unreadable == ("ftjob-lost",)
    assert len(key_of(tmp_path)) == 2


async def test_what_only_looks_sealed_is_left_alone(database: Database, tmp_path: Path) -> None:
    await add_job(database, load_vault(None, tmp_path), "ftjob-1")
    grader = {**METHOD["reinforcement"]["grader"], "input": "v1.deadbeef.AAAA"}
    async with database.begin() as session:
        method = await session.scalar(select(Job.method))
        assert method is not None
        changed = {**method, "reinforcement": {**method["reinforcement"], "grader": grader}}
        await session.execute(update(Job).values(method=changed))
    done = await rotation.rotate_key_file(database, tmp_path, sleep=at_once)
    assert (done.rows, done.unreadable) == (1, ())


async def test_a_second_pass_changes_nothing(database: Database, tmp_path: Path) -> None:
    old, new = "o" * 32, "n" * 32
    await add_job(database, Vault([old]), "ftjob-1")
    assert (await rotation.reseal(database, Vault([new, old]))).rows == 1
    assert (await rotation.reseal(database, Vault([new, old]))).rows == 0


def test_only_one_rotation_runs(tmp_path: Path) -> None:
    with only_rotation(tmp_path), pytest.raises(VaultError, match="another rotation"), only_rotation(tmp_path):
        pass


def test_a_new_key_is_put_on_top_once(tmp_path: Path) -> None:
    load_vault(None, tmp_path)
    [old] = key_of(tmp_path)
    assert add_key(tmp_path / KEY_FILE)
    assert not add_key(tmp_path / KEY_FILE)
    assert key_of(tmp_path)[1:] == [old]
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]
