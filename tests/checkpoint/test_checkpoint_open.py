"""From a URL to a store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spotserve.checkpoint.open import open_store
from spotserve.checkpoint.store import Commit, CommitOutcome, Verdict
from spotserve.config import StoreSettings
from spotserve.core.errors import ConfigError, StoreError

pytestmark = pytest.mark.anyio


async def test_default_is_sqlite_at_the_default_path(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "progress.db"
    store = open_store(StoreSettings(), path)
    assert not path.parent.exists(), "connected before it was used"
    await store.ping()
    assert path.exists() and store.display_url == f"sqlite:///{path}"
    await store.close()


async def test_sqlite_url_is_relative_with_three_slashes_and_absolute_with_four(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url, path in (("sqlite:///a.db", tmp_path / "a.db"), (f"sqlite:///{tmp_path}/b.db", tmp_path / "b.db")):
        store = open_store(StoreSettings(url=url), tmp_path / "unused.db")
        await store.ping()
        assert path.exists()
        await store.close()


async def test_none_agrees_and_forgets(tmp_path: Path) -> None:
    store = open_store(StoreSettings(url="none"), tmp_path / "unused.db")
    outcomes = await store.commit([Commit(request_id="r", epoch=3, position=5, token_ids=(1, 2))])
    assert outcomes == [CommitOutcome("r", Verdict.OK, 7, 3)]
    await store.put_call("c", b"record")
    await store.delete_call("c", ["r"])
    await store.ping()
    assert await store.load(["r"]) == {} and await store.get_call("c") is None
    await store.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["", "sqlite:///", "sqlite://file", "postgres://user:hunter2@host", "redis:/x:hunter2@", "redis://:hunter2@host:port"]
)
def test_other_urls_are_refused_without_telling_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^store\.url") as caught:
        open_store(StoreSettings(url=url), Path("unused"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:hunter2@host:6380/2?client_name=hunter2", "redis://host:6380/2"),
        ("rediss://:p%40ss@host", "rediss://host"),
        ("redis://host", "redis://host"),
    ],
)
async def test_credentials_are_not_shown(url: str, shown: str) -> None:
    store = open_store(StoreSettings(url=url), Path("unused"))
    assert store.display_url == shown
    await store.close()


async def test_redis_that_is_not_there_is_a_store_error() -> None:
    store = open_store(StoreSettings(url="redis://127.0.0.1:1", timeout_s=5), Path("unused"))
    with pytest.raises(StoreError, match=r"redis://127\.0\.0\.1:1"):
        await store.ping()
    await store.close()


def test_redis_client_is_loaded_only_when_asked_for_and_its_absence_is_explained() -> None:
    program = """
import sys
from pathlib import Path
from spotserve.checkpoint.open import open_store
from spotserve.config import StoreSettings
from spotserve.core.errors import ConfigError

open_store(StoreSettings(), Path("unused"))
assert not {"redis", "torch"} & set(sys.modules)
sys.modules["redis"] = None
try:
    open_store(StoreSettings(url="redis://host"), Path("unused"))
except ConfigError as error:
    assert "spotserve[redis]" in str(error)
else:
    raise AssertionError("opened without a client")
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
