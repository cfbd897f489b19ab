from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from sqlalchemy import make_url

from tests.unit.deploy.composition import COMPOSITION, ROOT


def run(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(script)], capture_output=True, text=True, timeout=30, check=False)


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "deploy" / "secrets.sh", tmp_path / "secrets.sh"))


def test_it_makes_what_the_composition_mounts_for_its_owner_alone(tmp_path: Path) -> None:
    done = run(copied(tmp_path))
    assert done.returncode == 0, done.stderr
    declared = COMPOSITION["secrets"].values()
    made = {path.name: path for path in (tmp_path / "secrets").iterdir()}
    assert made.keys() - {".gitignore"} == {Path(secret["file"]).name for secret in declared}
    assert {path.stat().st_mode & 0o077 for path in made.values()} == {0}
    assert made[".gitignore"].read_text() == "*\n"
    secrets = [path.read_text() for path in made.values()]
    assert not any(secret in done.stdout + done.stderr for secret in secrets if len(secret) > 2)


def test_the_urls_carry_the_passwords_of_the_servers(tmp_path: Path) -> None:
    run(copied(tmp_path))
    read = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert len(read["postgres_password"]) == 64
    assert make_url(read["database_url"]).password == read["postgres_password"]
    assert read["redis_password"] in read["redis_url"]
    assert read["redis_password"] != read["postgres_password"] != read["secret_key"]


def test_it_never_replaces_what_is_in_use(tmp_path: Path) -> None:
    script = copied(tmp_path)
    run(script)
    before = (tmp_path / "secrets" / "secret_key").read_text()
    again = run(script)
    assert again.returncode == 1
    assert "already" in again.stderr
    assert (tmp_path / "secrets" / "secret_key").read_text() == before


def test_the_script_can_be_started() -> None:
    assert os.access(ROOT / "deploy" / "secrets.sh", os.X_OK)
