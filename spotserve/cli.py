"""The command line: one verb per job, and the only place that chooses adapters."""

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
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from spotserve.config import load_settings
from spotserve.core.errors import ConfigError, SpotServeError
from spotserve.demo.run import run_demo
from spotserve.local_system import run_local_system
from spotserve.replay.run import ReplayOptions, run_replay
from spotserve.replay.timeline import Scaling
from spotserve.system_folder import SystemFolder

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
RESHAPE_TIMEOUT_S = 300.0

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Serve large language models on spot instances: one URL and unbroken token streams while machines come and go.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure one part on this machine.")
app.add_typer(bench, name="bench")
console = Console()
errors = Console(stderr=True)


def _system_url(url: str | None) -> str | None:
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
    typer.Option("--url", envvar="SPOTSERVE_URL", callback=_system_url, help="Which system: the URL that `spotserve up` printed."),
]
DEFAULT_URL = "http://127.0.0.1:8000"


def main() -> None:
    """Entry point: errors that are the world's doing become one line and exit code 1."""
    try:
        app()
    except SpotServeError as error:
        errors.print(Text.assemble(("error:", "red"), f" {error}"), highlight=False, soft_wrap=True)
        sys.exit(1)


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
        str | None, typer.Option(metavar="D,P,M", help="Replicas, pipeline stages, tensor shards; D may be 'auto'.")
    ] = None,
    speculation: Annotated[str | None, typer.Option(help="off, adaptive, or DRAFTER:K (ngram:4).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences that one replica runs at once.")] = None,
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
    data, pipeline, tensor = (None, None, None) if parallel is None else _parse_shape("--parallel ", parallel)
    if instances is None and data is not None and pipeline is not None and tensor is not None:
        instances = -(-data * pipeline * tensor // (devices or 1))
    sections: dict[str, dict[str, object]] = {
        "engine": {
            "kind": engine,
            "url": engine_url,
            "model": model,
            "speculation": speculation,
            "dtype": dtype,
            "max_batch": max_batch,
        },
        "gateway": {"port": port, "host": host},
        "controller": {"data": data, "pipeline": pipeline, "tensor": tensor},
        "store": {"url": store},
        "cloud": {"instances": instances, "devices": devices, "restock_s": restock},
    }
    settings = load_settings(**sections)
    if settings.engine.kind == "openai" and settings.controller.pipeline * settings.controller.tensor * settings.cloud.devices > 1:
        raise ConfigError("--engine openai: a server is taken whole, so --parallel must be D,1,1 and cloud.devices 1")
    if detach:
        if settings.gateway.port == 0:
            raise ConfigError("--detach needs a fixed --port: it is how the other commands find the system")
        url = _start_in_background(settings.gateway.port, [argument for argument in sys.argv[1:] if argument != "--detach"])
        console.print(f"serving at [bold]{url}/v1[/]; `spotserve down --url {url}` ends it")
    else:
        run_local_system(settings, console)


def _parse_shape(option: str, text: str) -> tuple[int | None, int, int]:
    """Replicas (None: as many as the devices allow), stages and shards."""
    try:
        data, pipeline, tensor = text.split(",")
        shape = None if data == "auto" else int(data), int(pipeline), int(tensor)
    except ValueError as error:
        raise ConfigError(f"{option}{text}: expected three numbers D,P,M such as 4,1,1 or auto,1,1") from error
    if min(number for number in shape if number is not None) < 1:
        raise ConfigError(f"{option}{text}: expected numbers of at least 1")
    return shape


def _start_in_background(port: int, arguments: list[str]) -> str:
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
                _stop(url)
            if process.poll() is not None:
                reason = problem or log_path.read_text().strip().rpartition("\n")[2].removeprefix("error: ")
                raise SpotServeError(f"the system did not start: {reason}; see {log_path.parent}")
            time.sleep(0.1)
    return url


def _start_problem(url: str) -> str | None:
    """Why no replica will come up; None while one still may."""
    if not _answers(f"{url}/health/live"):
        return None
    failed = [event for event in _get(url, "/admin/events")["events"] if event["kind"] == "failed"]
    return str(failed[0]["reason"]) if failed else None


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).is_success
    except httpx.HTTPError:
        return False


@app.command()
def down(url: UrlOption = DEFAULT_URL) -> None:
    """End a local cluster: its gateway, its controller and every instance."""
    console.print(f"the system at {url} has ended" if _stop(url) else f"no system runs at {url}")


def _stop(url: str) -> bool:
    """Ends the system at `url` and waits until it is gone; False when there was none."""
    folder = _folder_of(url)
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


@app.command()
def status(
    url: UrlOption = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="The whole document, for scripts.")] = False,
    decisions: Annotated[int, typer.Option(help="How many of the newest decisions to show.")] = 5,
) -> None:
    """Show instances, replicas, requests, the store and the newest decisions."""
    document = _get(url, "/status")
    if as_json:
        console.print_json(data=document)
        return
    console.print(
        f"[bold]{document['model']}[/] at {url}  plan epoch {document['epoch']}  "
        f"store {document['store']['url']} {'healthy' if document['store']['healthy'] else '[red]out of reach[/]'}"
    )
    fleet = Table("instance", "state", "pid", "zone", "market", title="instances", title_justify="left")
    for item in document["instances"]:
        fleet.add_row(item["id"], item["state"], str(item["pid"]), item["zone"], "spot" if item["spot"] else "on demand")
    console.print(fleet)
    replicas = Table("replica", "state", "P x M", "instances", "running", "waiting", title="replicas", title_justify="left")
    for item in document["replicas"]:
        shape = f"{item['parallel']['pipeline']} x {item['parallel']['tensor']}"
        replicas.add_row(item["id"], item["state"], shape, ", ".join(item["instances"]), str(item["running"]), str(item["waiting"]))
    console.print(replicas)
    console.print("requests: " + "  ".join(f"{name} {count}" for name, count in document["requests"].items()))
    for decision in _get(url, f"/decisions?limit={decisions}")["decisions"]:
        console.print(
            f"[dim]{time.strftime('%H:%M:%S', time.localtime(decision['time_s']))}[/] "
            + escape(f"{decision['cause']}: {decision['reason']}")
        )


@app.command()
def preempt(
    instance: Annotated[str, typer.Argument(help="Instance id, as `spotserve status` shows it.")],
    grace: Annotated[float | None, typer.Option(help="Seconds of notice before the instance is killed.")] = None,
    now: Annotated[bool, typer.Option("--now", help="Kill it without notice.")] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Take an instance away, as a cloud would."""
    if (grace is None) is not now:
        raise ConfigError("give either --grace SECONDS or --now")
    answer = _post(url, "/admin/preempt", {"instance": instance, "grace_s": 0.0 if now else grace})
    if as_json:
        console.print_json(data=answer)
    elif now:
        console.print(f"{instance} is gone")
    else:
        console.print(f"{instance} has its notice and will be killed in {grace:g} s")


@app.command()
def reshape(
    shape: Annotated[
        str, typer.Argument(metavar="D,P,M", help="Replicas, pipeline stages, tensor shards; D may be 'auto'.", show_default=False)
    ],
    wait: Annotated[bool, typer.Option(help="Return only when the new shape serves and the old one is gone.")] = True,
    url: UrlOption = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer, and what was moved, as JSON.")] = False,
) -> None:
    """Change the shape of a running system: it serves on while its weights and its sequences move."""
    data, pipeline, tensor = _parse_shape("", shape)
    known_epochs = {item["epoch"] for item in _get(url, "/status")["migrations"]}
    last_event = max((event["seq"] for event in _get(url, "/admin/events")["events"]), default=0)
    answer = _post(url, "/admin/reshape", {"data": data, "pipeline": pipeline, "tensor": tensor})
    if wait:
        changes = [item for item in _wait_for_shape(url, last_event)["migrations"] if item["epoch"] not in known_epochs]
        answer |= {"migration": changes[-1] if changes else None}
    if as_json:
        console.print_json(data=answer)
    elif not wait:
        console.print(f"{shape} is on its way")
    elif answer["migration"] is None:
        console.print(f"{shape} serves; nothing had to change")
    else:
        moved = answer["migration"]
        console.print(
            f"{shape} serves, {moved['finished_s'] - moved['started_s']:.1f} s after it was asked for; between devices moved "
            f"{moved['moved_bytes']} bytes of weights (planned: {moved['planned_bytes']}) and {moved['kv_bytes']} bytes of KV"
        )


def _wait_for_shape(url: str, last_event: int) -> Any:
    """The status document in which nothing but the wanted shape runs. Events after `last_event` say whether it never will."""
    deadline_s = time.monotonic() + RESHAPE_TIMEOUT_S
    with errors.status("") as shown:
        while time.monotonic() < deadline_s:
            events = _get(url, f"/admin/events?after={last_event}")["events"]
            failed = [event for event in events if event["kind"] == "failed"]
            if failed:
                raise SpotServeError(f"the new shape was given up: {failed[-1]['reason']}")
            if sum(event["kind"] == "reshape" for event in events) > 1:
                raise SpotServeError("another shape was asked for meanwhile")
            document = _get(url, "/status")
            if _has_settled(document):
                return document
            shown.update("; ".join(f"{item['id']} {item['state']}" for item in document["replicas"]))
            time.sleep(0.1)
    raise SpotServeError(f"the new shape does not serve after {RESHAPE_TIMEOUT_S:.0f} s: see `spotserve status --url {url}`")


def _has_settled(status: dict[str, Any]) -> bool:
    """Whether replicas of the wanted shape serve, as many as are wanted, and no others are there."""
    shape = status["shape"]
    parallel = {"pipeline": shape["pipeline"], "tensor": shape["tensor"]}
    devices = sum(item["devices"] for item in status["instances"] if item["state"] == "ready")
    fitting = devices // (shape["pipeline"] * shape["tensor"])
    wanted = fitting if shape["data"] is None else shape["data"]
    replicas = status["replicas"]
    return len(replicas) == wanted > 0 and all(item["state"] == "serving" and item["parallel"] == parallel for item in replicas)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/demo"),
    instances: Annotated[int, typer.Option(help="Instances of the local cluster.")] = 4,
    port: Annotated[int, typer.Option(help="Port of its gateway; 0: any free one.")] = 0,
) -> None:
    """Show it: a local cluster under real load, first left alone, then losing its machines to a trace.

    Ends with exit code 0 only when no request was lost and no token altered.
    """
    with _own_cluster(port, instances) as (url, secret):
        exit_code = run_demo(url, secret, out, console)
    raise typer.Exit(exit_code)


@app.command()
def replay(
    requests: Annotated[Path, typer.Option(help="Trace of requests: when, how long, how much.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    live: Annotated[bool, typer.Option("--live", help="Against a running system (the only form of this version).")] = False,
    capacity: Annotated[
        Path | None, typer.Option(help="Trace of machines that come and go; none: the fleet is left alone.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", envvar="SPOTSERVE_URL", callback=_system_url, help="A running system; none: one is started."),
    ] = None,
    instances: Annotated[int, typer.Option(help="Instances of a system that is started for this.")] = 4,
    grace: Annotated[float, typer.Option(help="Seconds of notice (no trace holds it).")] = 30.0,
    notice_share: Annotated[float, typer.Option(help="Share of losses that come with a notice.")] = 1.0,
    time_scale: Annotated[float, typer.Option(help="Seconds of trace per second of replay: 2 is twice as fast.")] = 1.0,
    rate_scale: Annotated[float, typer.Option(help="Requests per request of the trace.")] = 1.0,
    start: Annotated[float, typer.Option(help="Seconds of the trace to leave out at its beginning.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds of the trace to play; none: all.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses victims, notices and prompts.")] = 0,
    dtype: Annotated[str, typer.Option(help="What the system computes in: says how near a near tie is.")] = "float32",
    api_key: Annotated[str | None, typer.Option(envvar="SPOTSERVE_API_KEY", help="Key of the gateway, if it wants one.")] = None,
    reference: Annotated[bool, typer.Option(help="Answer every request once more, undisturbed, and compare the tokens.")] = True,
) -> None:
    """Play traces of machines and requests against a running system, and report what clients saw.

    Example:

        spotserve replay --live --capacity traces/demo-capacity.csv --requests traces/demo-requests.csv --grace 3 --out runs/mine
    """
    if not live:
        raise ConfigError("this version replays against a running system only: add --live")
    scaling = Scaling(
        start_s=start,
        duration_s=duration,
        time_scale=time_scale,
        rate_scale=rate_scale,
        grace_s=grace,
        notice_share=notice_share,
        seed=seed,
    )
    with contextlib.ExitStack() as at_end:
        if url is None:
            url, secret = at_end.enter_context(_own_cluster(0, instances))
        else:
            secret = _secret_of(url)
        options = ReplayOptions(
            url=url,
            secret=secret,
            out=out,
            requests=requests,
            capacity=capacity,
            scaling=scaling,
            reference=reference,
            dtype=dtype,
            api_key=api_key,
        )
        exit_code = run_replay(options, console)
    raise typer.Exit(exit_code)


@bench.command("engine")
def bench_engine(
    model: Annotated[
        str | None, typer.Option(help="A folder in Hugging Face format, or a hub id. Default: the model that ships.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (the default), bfloat16, float16 or float64.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    invariant: Annotated[str | None, typer.Option(help="batch (the default) or full: what logits do not depend on.")] = None,
    quantization: Annotated[str | None, typer.Option(help="none (the default) or int8: weights of linear layers.")] = None,
    concurrency: Annotated[str, typer.Option(help="Clients of each closed loop.")] = "1,4,16,64",
    new_tokens: Annotated[int, typer.Option(min=2, help="Output tokens of each request.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of each loop.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Output tokens per second, waits, and the share of the memory's bandwidth of one replica on this machine."""
    given = {"model": model, "dtype": dtype, "invariant": invariant, "quantization": quantization}
    flags = {name: value for name, value in given.items() if value is not None}
    flags |= {"threads": str(threads), "concurrency": concurrency, "new-tokens": str(new_tokens), "rounds": str(rounds)}
    command = [
        sys.executable,
        "-m",
        "spotserve.bench.engine",
        *(part for name, value in flags.items() for part in (f"--{name}", value)),
    ]
    # A process of its own: the command line does not load torch, and threads are counted when it starts.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    sys.exit(subprocess.run([*command, *(["--json"] if as_json else [])], env=environment, check=False).returncode)


@contextlib.contextmanager
def _own_cluster(port: int, instances: int) -> Iterator[tuple[str, str]]:
    """A local cluster for as long as it is needed; its URL and secret. Its folder, logs included, is left only when it failed."""
    port = port or _free_port()
    arguments = ["up", "--port", str(port), "--instances", str(instances)]
    url = _start_in_background(port, arguments)
    try:
        yield url, _secret_of(url)
    finally:
        _stop(url)
    shutil.rmtree(_folder_of(url).path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _folder_of(url: str) -> SystemFolder:
    port = httpx.URL(url).port
    assert port is not None, "checked where the URL came in"
    return SystemFolder.for_port(port)


def _secret_of(url: str) -> str:
    """SPOTSERVE_SECRET, or what the system's folder on this machine says."""
    record = _folder_of(url).read()
    secret = os.environ.get("SPOTSERVE_SECRET") or (record.secret if record is not None else None)
    if secret is None:
        raise ConfigError(f"no secret for {url}: run this on the machine of `spotserve up`, or set SPOTSERVE_SECRET")
    return secret


def _get(url: str, path: str) -> Any:
    return _call("GET", url, path, None)


def _post(url: str, path: str, body: dict[str, object]) -> Any:
    return _call("POST", url, path, body)


def _call(method: str, url: str, path: str, body: dict[str, object] | None) -> Any:
    headers = {"authorization": f"Bearer {_secret_of(url)}"} if path.startswith("/admin") else {}
    try:
        answer = httpx.request(method, url + path, json=body, headers=headers, timeout=10.0)
    except httpx.HTTPError as error:
        raise SpotServeError(f"no system answers at {url}: {error}; start one with `spotserve up`") from error
    if answer.is_error:
        raise SpotServeError(f"{url}{path} answered {answer.status_code}: {answer.text}")
    try:
        return answer.json()
    except ValueError as error:
        raise SpotServeError(f"{url}{path} did not answer with JSON: is that a SpotServe system?") from error


if __name__ == "__main__":
    main()
