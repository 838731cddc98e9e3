"""From the settings to a store: the one place that knows which URL means which store."""

import importlib
from pathlib import Path
from urllib.parse import urlsplit

from spotserve.checkpoint.null import NullStore
from spotserve.checkpoint.sqlite import SqliteStore
from spotserve.checkpoint.store import Store
from spotserve.config import StoreSettings
from spotserve.core.errors import ConfigError
from spotserve.system_clock import SystemClock

_SQLITE_PREFIX = "sqlite:///"


def open_store(settings: StoreSettings, default_path: Path) -> Store:
    """The store that `settings.url` names; SQLite at `default_path` when it names none. Connects at the first use.

    `sqlite:///progress.db` is relative to the working directory, `sqlite:////var/lib/progress.db` is absolute.

    Raises:
        ConfigError: the URL is not one of a store, or the library for it is not installed.
    """
    url = settings.url
    if url is None:
        return _open_sqlite(settings, default_path)
    if url == "none":
        return NullStore()
    if url.startswith(_SQLITE_PREFIX) and len(url) > len(_SQLITE_PREFIX):
        return _open_sqlite(settings, Path(url.removeprefix(_SQLITE_PREFIX)))
    if url.startswith(("redis://", "rediss://")):
        return _open_redis(settings, url)
    scheme = urlsplit(url).scheme  # never the whole URL: it may hold a password
    raise ConfigError(f"store.url: expected sqlite:///PATH, redis://HOST, rediss://HOST or none, got scheme {scheme!r}")


def _open_sqlite(settings: StoreSettings, path: Path) -> SqliteStore:
    return SqliteStore(
        path,
        time_to_live_s=settings.time_to_live_s,
        max_bytes=settings.max_bytes,
        timeout_s=settings.timeout_s,
        clock=SystemClock(),
    )


def _open_redis(settings: StoreSettings, url: str) -> Store:
    try:
        module = importlib.import_module("spotserve.checkpoint.redis")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "redis":
            raise
        raise ConfigError("store.url names Redis, whose client is not installed: pip install 'spotserve[redis]'") from error
    store: Store = module.RedisStore(url, time_to_live_s=settings.time_to_live_s, timeout_s=settings.timeout_s)
    return store
