"""Models by hub id: from the hub's cache when offline, from a hub on this machine otherwise; never from the real one."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from files_scene import random_tensors, write_model

from spotserve.core.errors import ModelError
from spotserve.engine.files.open import open_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "someone/tiny"

ASK = """
import json, sys
from spotserve.core.errors import ModelError
from spotserve.engine.files.open import open_files

try:
    files = open_files(sys.argv[1], sys.argv[2:] or None)
except ModelError as error:
    print(json.dumps({"error": str(error)}))
else:
    sums = {name: files.read(name).double().sum().item() for name in sys.argv[2:] or files.names()}
    here = sorted(path.name for path in files.config_folder.iterdir())
    print(json.dumps({"sums": sums, "here": here}))
"""
TENSORS = random_tensors({"a": (4, 3), "b": (5,), "c": (2, 2)})


class Hub:
    """The few routes of the hub's API that a download takes, for one model in a folder."""

    def __init__(self, folder: Path) -> None:
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:  # the names are the library's
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                path = unquote(self.path.partition("?")[0])
                name = path.removeprefix(f"/{MODEL}/resolve/{COMMIT}/")
                if path.startswith(f"/api/models/{MODEL}"):
                    files = sorted(each.name for each in folder.iterdir())
                    if "/tree/" in path:
                        tree = [
                            {"type": "file", "path": each, "size": (folder / each).stat().st_size, "oid": "0"} for each in files
                        ]
                        body = json.dumps(tree).encode()
                    else:
                        info = {"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": each} for each in files]}
                        body = json.dumps(info).encode()
                elif name != path and (folder / name).is_file():
                    body = (folder / name).read_bytes()
                    if with_body:
                        hub.fetched.append(name)
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha1(body, usedforsecurity=False).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *arguments: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(params=[1, 3], ids=["one file", "three shards"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(write_model(tmp_path / "model", TENSORS, request.param))
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def ask(cache: Path, model: str, *wanted: str, url: str = "http://127.0.0.1:9", offline: bool = False) -> dict[str, object]:
    """What another process, which reads the hub's settings afresh, finds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {
        **kept,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HOME": str(cache),
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    done = subprocess.run([sys.executable, "-c", ASK, model, *wanted], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def sums(*names: str) -> dict[str, float]:
    return {name: TENSORS[name].double().sum().item() for name in names}


def test_fetched_once_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert ask(cache, MODEL, url=hub.url)["sums"] == sums("a", "b", "c")
    assert len(hub.fetched) == len(set(hub.fetched))
    hub.fetched.clear()
    assert ask(cache, MODEL, url=hub.url, offline=True)["sums"] == sums("a", "b", "c")
    assert not hub.fetched


def test_only_the_shards_that_are_wanted_are_fetched(hub: Hub, tmp_path: Path) -> None:
    found = ask(tmp_path / "cache", MODEL, "a", "c", url=hub.url)
    assert found["sums"] == sums("a", "c")
    assert "model-00002-of-00003.safetensors" not in hub.fetched
    if "model.safetensors" not in hub.fetched:
        missing = ask(tmp_path / "cache", MODEL, "b", offline=True)
        assert "does not hold model-00002-of-00003.safetensors of it" in str(missing["error"])


@pytest.mark.parametrize("hub", [1], indirect=True)
def test_refusals_say_what_was_expected(tmp_path: Path, hub: Hub) -> None:
    cache = tmp_path / "cache"
    unknown = str(ask(cache, "someone/else", url=hub.url)["error"])
    assert "someone/else: neither a folder here nor a model on the hub" in unknown
    for unreachable in (ask(cache, MODEL), ask(cache, MODEL, url=hub.url, offline=True)):
        assert re.search(r"someone/tiny: no folder, and the hub's cache.*out of reach or HF_HUB_OFFLINE", str(unreachable["error"]))


def test_name_of_neither_form_is_refused() -> None:
    with pytest.raises(ModelError, match="not a hub id!: neither a folder nor a hub id"):
        open_files("not a hub id!")
