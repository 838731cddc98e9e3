"""Verbs that start and end a local cluster, and clusters that other verbs start for themselves."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import httpx
import typer

from spotserve.cli.program import app, console
from spotserve.cli.reach import DEFAULT_URL, UrlOption, folder_of, get, secret_of
from spotserve.cli.shapes import parse_shape
from spotserve.config import load_settings
from spotserve.core.errors import ConfigError, SpotServeError
from spotserve.local_system import run_local_system
from spotserve.system_folder import SystemFolder

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


@app.command()
def up(
    instances: Annotated[
        int | None, typer.Option(help="Worker processes that play instances. Default: as many as --parallel needs, else 2.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices of each instance: rank processes that compute side by side.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder in Hugging Face format, or a hub id. Default: the model that ships.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="native, or openai: a server that runs already and speaks the OpenAI API, at --engine-url.")
    ] = None,
    engine_url: Annotated[
        str | None, typer.Option(help="That server, such as http://127.0.0.1:8001/v1. Its key: SPOTSERVE_ENGINE__API_KEY.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="sqlite:///PATH, redis://HOST:PORT/DB, or none.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the OpenAI-compatible gateway.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the gateway; only loopback unless asked.")] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="D,P,M",
            help="Replicas, pipeline stages, tensor shards; D may be 'auto'. 'auto' alone: the planner chooses, and mixes shapes.",
        ),
    ] = None,
    speculation: Annotated[
        str | None, typer.Option(help="off, adaptive, or DRAFTER:K: ngram:4, suffix:8, model:3, staged:5. None changes an answer.")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="A small model with the same tokenizer, which drafts: a local folder or a hub id.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda: what a rank computes on.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences that one replica runs at once.")] = None,
    hedge: Annotated[
        bool,
        typer.Option("--hedge", help="The controller holds --instances: it rents replacements at the notice, spot or on demand."),
    ] = False,
    restock: Annotated[float | None, typer.Option(help="Seconds until a taken instance's place goes to a new one.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; flags and environment go before it.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the system serves; `spotserve down` ends it.")] = False,
) -> None:
    """Start a local cluster: gateway and controller in this process, every instance a worker process.

    Then point any OpenAI client at the printed URL:

        curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
             -d '{"model": "spotserve-demo", "prompt": "def fibonacci(n):", "max_tokens": 32}'
    """
    if config is not None:
        os.environ["SPOTSERVE_CONFIG"] = str(config)
    data, pipeline, tensor = (None, None, None) if parallel is None else parse_shape("--parallel ", parallel)
    if instances is None and data is not None and pipeline is not None and tensor is not None:
        instances = -(-data * pipeline * tensor // (devices or 1))
    sections: dict[str, dict[str, object]] = {
        "engine": {
            "kind": engine,
            "url": engine_url,
            "model": model,
            "speculation": speculation,
            "draft_model": draft_model,
            "dtype": dtype,
            "device": device,
            "max_batch": max_batch,
        },
        "gateway": {"port": port, "host": host},
        "controller": {
            "data": data,
            "pipeline": pipeline,
            "tensor": tensor,
            "planning": None if parallel is None else "auto" if pipeline is None else "shape",
        },
        "store": {"url": store},
        "cloud": {"instances": instances, "devices": devices, "restock_s": restock},
    }
    settings = load_settings(**sections)
    if hedge or settings.controller.instances is not None:
        if restock is not None:
            raise ConfigError("--restock SECONDS is how the provider replaces what it takes; with --hedge the controller does")
        sections["controller"]["instances"] = instances or settings.controller.instances or settings.cloud.instances
        settings = load_settings(**sections)
    num_slots = settings.controller.pipeline * settings.controller.tensor * settings.cloud.devices
    if settings.engine.kind == "openai" and (num_slots > 1 or settings.controller.planning == "auto"):
        raise ConfigError("--engine openai: a server is taken whole, so --parallel must be D,1,1 and cloud.devices 1")
    if detach:
        if settings.gateway.port == 0:
            raise ConfigError("--detach needs a fixed --port: it is how the other commands find the system")
        url = start_in_background(settings.gateway.port, [argument for argument in sys.argv[1:] if argument != "--detach"])
        console.print(f"serving at [bold]{url}/v1[/]; `spotserve down --url {url}` ends it")
    else:
        run_local_system(settings, console)


def start_in_background(port: int, arguments: list[str]) -> str:
    """Starts this program in a session of its own and waits until it serves; its URL."""
    url = f"http://127.0.0.1:{port}"
    if _answers(f"{url}/health/live"):
        raise ConfigError(f"a system answers at {url} already: `spotserve down --url {url}` ends it, or choose another --port")
    folder = SystemFolder.for_port(port)
    folder.create()
    log_path = folder.log_path("system")
    with log_path.open("ab") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "spotserve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )
    with console.status("starting a local cluster ..."):
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not _answers(f"{url}/health/ready"):
            problem = _start_problem(url)
            if process.poll() is None and (problem or time.monotonic() > deadline_s):
                stop(url)
            if process.poll() is not None:
                reason = problem or log_path.read_text().strip().rpartition("\n")[2].removeprefix("error: ")
                raise SpotServeError(f"the system did not start: {reason}; see {log_path.parent}")
            time.sleep(0.1)
    return url


def _start_problem(url: str) -> str | None:
    """Why no replica will come up; None while one still may."""
    if not _answers(f"{url}/health/live"):
        return None
    failed = [event for event in get(url, "/admin/events")["events"] if event["kind"] == "failed"]
    return str(failed[0]["reason"]) if failed else None


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).is_success
    except httpx.HTTPError:
        return False


@app.command()
def down(url: UrlOption = DEFAULT_URL) -> None:
    """End a local cluster: its gateway, its controller and every instance."""
    console.print(f"the system at {url} has ended" if stop(url) else f"no system runs at {url}")


def stop(url: str) -> bool:
    """Ends the system at `url` and waits until it is gone; False when there was none."""
    folder = folder_of(url)
    record = folder.read()
    if record is None or not _is_running(record.pid):
        return False
    os.kill(record.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while _is_running(record.pid):
        if time.monotonic() > deadline_s:
            raise SpotServeError(
                f"process {record.pid} has not ended within {STOP_TIMEOUT_S:.0f} s; see {folder.log_path('system')}"
            )
        time.sleep(0.05)
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@contextlib.contextmanager
def own_cluster(port: int, instances: int, config: Path | None = None) -> Iterator[tuple[str, str]]:
    """A local cluster for as long as it is needed; its URL and secret. Its folder, logs included, is left only when it failed.
    `config`: a TOML file of settings, as of `up --config`."""
    port = port or _free_port()
    arguments = ["up", "--port", str(port), "--instances", str(instances)]
    if config is not None:
        arguments += ["--config", str(config)]
    url = start_in_background(port, arguments)
    try:
        yield url, secret_of(url)
    finally:
        stop(url)
    shutil.rmtree(folder_of(url).path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
