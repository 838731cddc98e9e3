"""The command line: help, mistakes in its use (exit code 2), and the world's (exit code 1, one line)."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spotserve.cli import app as cli
from spotserve.core.messages import Address
from spotserve.system_folder import SystemFolder, SystemRecord

VERBS = ["up", "down", "status", "preempt", "reshape", "plan", "advise", "doctor", "demo"]
GROUPS = ["bench", "replay", "traces"]

STATUS: dict[str, Any] = {
    "epoch": 4,
    "model": "spotserve-demo",
    "instances": [{"id": "i-1", "state": "ready", "pid": 7, "devices": 1, "spot": True, "zone": "z", "deadline_s": None}],
    "replicas": [
        {
            "id": "r-1",
            "state": "serving",
            "parallel": {"pipeline": 1, "tensor": 1},
            "instances": ["i-1"],
            "running": 2,
            "waiting": 0,
        }
    ],
    "requests": {"queued": 0, "running": 2},
    "shape": {"data": 1, "pipeline": 1, "tensor": 1},
    "migrations": [],
    "store": {"url": "sqlite:///x", "healthy": True},
    "hedge": {
        "wanted": 2,
        "spot": 3,
        "spares": 1,
        "on_demand": 0,
        "asked": 1,
        "zones": [{"zone": "a", "breaker": "closed"}, {"zone": "b", "breaker": "half_open"}],
    },
}
DECISIONS = {"decisions": [{"time_s": 0.0, "cause": "Tick", "reason": "brackets [/are] no markup"}]}


class System(http.server.BaseHTTPRequestHandler):
    """A system that answers what its commands ask."""

    heard: list[tuple[str, str | None, Any]]
    events: list[dict[str, Any]]
    migrations: list[dict[str, Any]]

    def do_GET(self) -> None:
        after = self.path.partition("after=")[2] or 0
        events = {"events": [event for event in self.events if event["seq"] > int(after)]}
        known: dict[str, Any] = {"/status": STATUS | {"migrations": self.migrations}, "/decisions?limit=5": DECISIONS}
        known |= {self.path: events} if self.path.startswith("/admin/events") else {}
        self._answer(200 if self.path in known else 404, json.dumps(known.get(self.path, {"error": self.path})))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.heard.append((self.path, self.headers["authorization"], body))
        if self.path == "/admin/reshape":
            self._reshape(body)
            return
        known = body["instance"] == "i-1"
        self._answer(200 if known else 404, json.dumps(body | {"deadline_s": 5.0} if known else {"error": "no instance"}))

    def _reshape(self, body: dict[str, Any]) -> None:
        """Two replicas do not fit; two stages cannot be brought up; one shard is brought up."""
        if body["data"] == 2:
            self._answer(409, json.dumps({"detail": "2,1,1 takes 2 devices, there is 1"}))
            return
        self.events.append({"seq": 2, "kind": "reshape"})
        if body["pipeline"] == 2:
            self.events.append({"seq": 3, "kind": "failed", "reason": "no such layer"})
        self.migrations.append(
            {"epoch": 5, "started_s": 1.0, "finished_s": 3.5, "planned_bytes": 7, "moved_bytes": 7, "kv_bytes": 9}
        )
        self._answer(200, json.dumps({"epoch": 5}))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a running system whose folder this machine has."""
    handler = type(
        "Handler", (System,), {"heard": [], "events": [{"seq": 1, "kind": "failed", "reason": "long ago"}], "migrations": []}
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    monkeypatch.setenv("SPOTSERVE_HOME", str(tmp_path))
    url = f"http://127.0.0.1:{server.server_port}"
    folder = SystemFolder.for_port(server.server_port)
    folder.create()
    folder.write(SystemRecord(pid=os.getpid(), url=url, controller=Address("127.0.0.1", 1), secret="s3cret"))
    yield url
    server.shutdown()
    serving.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTSERVE_HOME", str(tmp_path))
    for name in ("SPOTSERVE_URL", "SPOTSERVE_SECRET", "SPOTSERVE_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the whole program."""
    monkeypatch.setattr("sys.argv", ["spotserve", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("verb", [*VERBS, *GROUPS])
def test_every_verb_explains_itself(verb: str) -> None:
    result = CliRunner().invoke(cli.app, [verb, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_all_verbs_are_listed() -> None:
    output = CliRunner().invoke(cli.app, ["--help"]).output
    assert all(verb in output for verb in [*VERBS, *GROUPS])
    commands = [command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    groups = [str(group.name) for group in cli.app.registered_groups]
    assert sorted([*VERBS, *GROUPS]) == sorted([*commands, *groups])


@pytest.mark.parametrize("arguments", [["fly"], ["up", "--wings"], ["up", "--port", "many"], ["preempt"], ["replay", "--live"]])
def test_wrong_use_ends_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["up", "--port", "70000"], "gateway.port"),
        (["up", "--parallel", "1,1"], "--parallel 1,1"),
        (["up", "--parallel", "[/]"], "--parallel [/]"),
        (["up", "--parallel", "1,0,2"], "--parallel 1,0,2"),
        (["reshape", "1,auto,1"], "1,auto,1"),
        (["up", "--engine", "openai"], "--engine-url"),
        (["up", "--engine-url", "http://127.0.0.1:1/v1"], "--engine openai"),
        (["up", "--engine", "magic"], "engine.kind"),
        (["up", "--device", "tpu"], "engine.device"),
        (["up", "--speculation", "model:3"], "--draft-model"),
        (["up", "--engine", "openai", "--engine-url", "http://h/v1", "--parallel", "1,1,2"], "taken whole"),
        (["up", "--speculation", "magic"], "engine.speculation"),
        (["up", "--dtype", "int4"], "engine.dtype"),
        (["up", "--detach", "--port", "0"], "--port"),
        (["up", "--hedge", "--restock", "1"], "--restock"),
        (["up", "--hedge", "--instances", "100"], "max_instances is 64"),
        (["preempt", "i-1"], "--grace SECONDS or --now"),
        (["preempt", "i-1", "--now", "--grace", "3"], "--grace SECONDS or --now"),
        (["status", "--url", "http://127.0.0.1:1"], "no system answers"),
        (["status", "--url", "http://127.0.0.1:x"], "--url"),
        (["status", "--url", "nonsense"], "with a port"),
        (["preempt", "i-1", "--now", "--url", "http://127.0.0.1:1"], "no secret"),
        (["replay", "--requests", "a", "--out", "b"], "--capacity"),
    ],
)
def test_what_is_the_worlds_doing_ends_with_1_and_one_line(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, monkeypatch=monkeypatch) == 1
    told = capfd.readouterr().err
    assert told.startswith("error: ")
    assert says in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_status_is_shown_whichever_way_the_url_is_written(system: str, suffix: str) -> None:
    result = CliRunner().invoke(cli.app, ["status", "--url", system + suffix])
    assert result.exit_code == 0, result.output
    for shown in (
        "i-1",
        "r-1",
        "serving",
        "running 2",
        "brackets [/are] no markup",
        "wanted 2  spot 3  spares 1  on demand 0",
        "b half_open",
    ):
        assert shown in result.output


def test_status_for_scripts_is_the_whole_document(system: str) -> None:
    assert json.loads(CliRunner().invoke(cli.app, ["status", "--json", "--url", system]).output) == STATUS


def test_preempt_pulls_the_lever_with_the_secret(system: str) -> None:
    result = CliRunner().invoke(cli.app, ["preempt", "i-1", "--grace", "3", "--json", "--url", system])
    assert json.loads(result.output) == {"instance": "i-1", "grace_s": 3.0, "deadline_s": 5.0}
    assert CliRunner().invoke(cli.app, ["preempt", "i-1", "--now", "--url", system]).output == "i-1 is gone\n"


def test_an_unknown_instance_is_an_error(system: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("preempt", "i-9", "--now", "--url", system, monkeypatch=monkeypatch) == 1
    assert "404" in capfd.readouterr().err


def test_reshape_waits_and_tells_what_moved(system: str) -> None:
    output = CliRunner().invoke(cli.app, ["reshape", "auto,1,1", "--url", system]).output.replace("\n", "")
    assert "2.5 s" in output and "7 bytes of weights (planned: 7) and 9 bytes of KV" in output
    answer = json.loads(CliRunner().invoke(cli.app, ["reshape", "1,1,1", "--no-wait", "--json", "--url", system]).output)
    assert answer == {"epoch": 5}


@pytest.mark.parametrize(
    ("shape", "says"), [("2,1,1", "2,1,1 takes 2 devices, there is 1"), ("1,2,1", "the new shape was given up: no such layer")]
)
def test_a_shape_that_cannot_be_had_is_an_error(
    shape: str, says: str, system: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("reshape", shape, "--url", system, monkeypatch=monkeypatch) == 1
    assert says in capfd.readouterr().err


def test_down_without_a_system_says_so() -> None:
    result = CliRunner().invoke(cli.app, ["down", "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 0
    assert "no system runs" in result.output
