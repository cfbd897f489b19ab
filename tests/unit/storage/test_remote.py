"""An object store that is slow, away or set up wrongly; what its errors say, and what they must not say."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from app.core.settings import Settings
from app.files.storage_probe import probe
from app.storage import remote, thread
from app.storage.build import open_store
from app.storage.errors import StorageUnavailable
from app.storage.local import LocalStore
from app.storage.remote import RemoteStore, redacted
from tests import s3 as real


class Flaky:
    """Fails as often as it is told, then works."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls = 0

    def __call__(self, fs: Any, path: str) -> str:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return path


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def store(tmp_path: Path, pauses: list[float]) -> RemoteStore:
    options = '{"secret": "sesame-1", "nested": {"session_token": "opaque-2"}}'
    return RemoteStore("memory://key:pass-3@there/p", options, tmp_path, sleep=pauses.append)


def test_a_failure_that_may_pass_is_tried_again_with_growing_pauses(store: RemoteStore, pauses: list[float]) -> None:
    work = Flaky(OSError("reset"), TimeoutError(), OSError("busy"))
    assert store._call("x", work).endswith("/x")
    assert (work.calls, pauses) == (4, [0.5, 1.0, 2.0])


def test_after_the_last_try_the_error_names_the_store_and_the_reason(store: RemoteStore) -> None:
    work = Flaky(*(OSError(f"reset {n}") for n in range(9)))
    with pytest.raises(StorageUnavailable, match=r"^storage at memory://there/p: reset 3$"):
        store._call("x", work)


@pytest.mark.parametrize("failure", [PermissionError("no"), ImportError("no"), ValueError("no")])
def test_what_would_fail_again_is_not_tried_again(store: RemoteStore, failure: Exception) -> None:
    work = Flaky(failure, OSError())
    with pytest.raises(StorageUnavailable, match="no"):
        store._call("x", work)
    assert work.calls == 1


def test_a_call_that_hangs_is_given_up(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ANSWER_S", 0.2)
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match="no answer in time"):
        store._call("x", lambda fs, path: time.sleep(3))
    assert time.monotonic() - began < 2.5


async def test_a_disk_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread, "HANGS_S", 0.05)
    with pytest.raises(StorageUnavailable, match=r"no answer within 0\.05 s"):
        await thread.in_thread(time.sleep, 3)


def test_no_credential_stands_in_an_error(store: RemoteStore) -> None:
    said = "401 for memory://key:pass-3@there/p with sesame-1 and opaque-2"
    with pytest.raises(StorageUnavailable) as caught:
        store._call("x", Flaky(PermissionError(said)))
    assert caught.value.reason == "401 for memory://there/p with *** and ***"
    assert caught.value.__cause__ is None
    assert redacted("s3://user:word@host:9/b/p?X-Amz-Signature=abc") == "s3://host:9/b/p"


def _raised(work: Callable[[], object]) -> str:
    with pytest.raises(StorageUnavailable) as caught:
        work()
    return str(caught.value)


def test_a_wrong_set_up_is_named(tmp_path: Path) -> None:
    def said(url: str, options: str | None = None) -> str:
        secret = SecretStr(options) if options else None
        return _raised(lambda: probe(Settings(data_dir=tmp_path, storage_url=url, storage_options=secret)))

    assert "Protocol not known: nosuch" in said("nosuch://bucket")
    broken = said("memory://x", '{"secret": "sesame"')
    assert "HONE_STORAGE_OPTIONS is no JSON object" in broken
    assert "sesame" not in broken
    (tmp_path / "file").touch()
    assert "directory" in said(str(tmp_path / "file"))


def test_an_s3_server_that_is_away_is_named_within_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSES_S", ())
    options = SecretStr('{"key": "k", "secret": "sesame", "endpoint_url": "http://127.0.0.1:9"}')
    settings = Settings(data_dir=tmp_path, storage_url="s3://bucket/p", storage_options=options)
    began = time.monotonic()
    assert "s3://bucket/p/files" in _raised(lambda: probe(settings))
    assert time.monotonic() - began < remote.ANSWER_S


def test_a_bucket_that_does_not_exist_is_named(s3: real.S3, tmp_path: Path) -> None:
    settings = s3.settings(tmp_path).model_copy(update={"storage_url": "s3://no-such-bucket/p"})
    assert "bucket" in _raised(lambda: probe(settings)).lower()


def test_a_library_that_is_not_installed_is_named(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert "pip install" in _raised(lambda: store.size("x"))


def test_a_path_that_depends_on_the_working_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absolute path"):
        Settings(data_dir=tmp_path, storage_url="some/where")


def test_a_folder_may_be_named_as_a_path_or_a_url(tmp_path: Path) -> None:
    for url in (str(tmp_path / "st ore"), f"file://{tmp_path}/st%20ore"):
        made = open_store(Settings(data_dir=tmp_path / "data", storage_url=url), "traces")
        assert isinstance(made, LocalStore)
        assert made.local("x") == tmp_path / "st ore" / "traces" / "x"
