"""Reaching a running system: its URL, its folder on this machine, its secret, and its answers."""

import os
from typing import Annotated, Any

import httpx
import typer

from spotserve.core.errors import ConfigError, SpotServeError
from spotserve.system_folder import SystemFolder


def system_url(url: str | None) -> str | None:
    """The system's own URL, also when it was given as clients of the API need it."""
    if url is None:
        return None
    try:
        port = httpx.URL(url).port
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url}: {error}") from error
    if port is None:
        raise ConfigError(f"--url {url}: expected a URL with a port, such as {DEFAULT_URL}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


UrlOption = Annotated[
    str,
    typer.Option("--url", envvar="SPOTSERVE_URL", callback=system_url, help="Which system: the URL that `spotserve up` printed."),
]
DEFAULT_URL = "http://127.0.0.1:8000"


def folder_of(url: str) -> SystemFolder:
    """Where a system on this machine keeps its files."""
    port = httpx.URL(url).port
    assert port is not None, "checked where the URL came in"
    return SystemFolder.for_port(port)


def secret_of(url: str) -> str:
    """SPOTSERVE_SECRET, or what the system's folder on this machine says."""
    record = folder_of(url).read()
    secret = os.environ.get("SPOTSERVE_SECRET") or (record.secret if record is not None else None)
    if secret is None:
        raise ConfigError(f"no secret for {url}: run this on the machine of `spotserve up`, or set SPOTSERVE_SECRET")
    return secret


def get(url: str, path: str) -> Any:
    """The JSON document at `path` of a system.

    Raises:
        SpotServeError: nobody answers there, or not with what was asked for.
    """
    return _call("GET", url, path, None)


def post(url: str, path: str, body: dict[str, object]) -> Any:
    """What a system answers to `body`. Raises what `get` does."""
    return _call("POST", url, path, body)


def _call(method: str, url: str, path: str, body: dict[str, object] | None) -> Any:
    headers = {"authorization": f"Bearer {secret_of(url)}"} if path.startswith("/admin") else {}
    try:
        answer = httpx.request(method, url + path, json=body, headers=headers, timeout=10.0)
    except httpx.HTTPError as error:
        raise SpotServeError(f"no system answers at {url}: {error}; start one with `spotserve up`") from error
    if answer.is_error:
        raise SpotServeError(f"{url}{path} answered {answer.status_code}: {_detail(answer)}")
    try:
        return answer.json()
    except ValueError as error:
        raise SpotServeError(f"{url}{path} did not answer with JSON: is that a SpotServe system?") from error


def _detail(answer: httpx.Response) -> str:
    """What an error says: the sentence in it, if there is one."""
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return answer.text
    return detail if isinstance(detail, str) else answer.text
