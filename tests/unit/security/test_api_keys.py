"""Keys: well formed or refused at once; secrets made once, private, and replaceable."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from app.core.settings import Settings
from app.security.api_keys import SECRET_FILE, KeyRing, _create_once, load_peppers, new_key, well_formed


def test_a_new_key_is_long_random_and_well_formed() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(well_formed(key) and len(key) >= len("sk-hone-") + 43 for key in keys)


@pytest.mark.parametrize(
    "damage", [lambda k: k[:-1], lambda k: k[:20] + "!" + k[21:], lambda k: "sk-" + k, lambda k: k + "é"]
)
def test_a_damaged_key_is_not_well_formed(damage) -> None:  # type: ignore[no-untyped-def]
    assert not well_formed(damage(new_key()))


def test_the_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert load_peppers(settings) == load_peppers(settings)
    assert (tmp_path / SECRET_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [SECRET_FILE]


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    _create_once(tmp_path / "s", b"first")
    _create_once(tmp_path / "s", b"second")
    assert (tmp_path / "s").read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_key_survives_the_rotation_of_the_secret(tmp_path: Path) -> None:
    def ring(secret: str) -> KeyRing:
        return KeyRing(load_peppers(Settings(data_dir=tmp_path, secret_key=SecretStr(secret))))

    key = new_key()
    stored = ring("old" * 11).digests(key)[0]
    rotated = ring(f"{'new' * 11},{'old' * 11}").digests(key)
    assert stored in rotated
    assert stored != rotated[0]
