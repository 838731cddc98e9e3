"""Verbs for a running system: look at it, take an instance away, change its shape."""

import time
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from spotserve.cli.program import app, console, errors
from spotserve.cli.reach import DEFAULT_URL, UrlOption, get, post
from spotserve.cli.shapes import parse_shape
from spotserve.core.errors import ConfigError, SpotServeError

RESHAPE_TIMEOUT_S = 300.0


@app.command()
def status(
    url: UrlOption = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="The whole document, for scripts.")] = False,
    decisions: Annotated[int, typer.Option(help="How many of the newest decisions to show.")] = 5,
) -> None:
    """Show instances, replicas, requests, the store and the newest decisions."""
    document = get(url, "/status")
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
    if document["hedge"] is not None:
        console.print(_hedge_line(document["hedge"]))
    for decision in get(url, f"/decisions?limit={decisions}")["decisions"]:
        console.print(
            f"[dim]{time.strftime('%H:%M:%S', time.localtime(decision['time_s']))}[/] "
            + escape(f"{decision['cause']}: {decision['reason']}")
        )


def _hedge_line(hedge: dict[str, Any]) -> str:
    """What the controller holds, and which zones it does not ask."""
    if hedge["spot"] is None:
        return f"hedge: wanted {hedge['wanted']}; finding out what is there"
    shunned = [f"  {each['zone']} {each['breaker']}" for each in hedge["zones"] if each["breaker"] != "closed"]
    counts = "  ".join(f"{name.replace('_', ' ')} {hedge[name]}" for name in ("wanted", "spot", "spares", "on_demand", "asked"))
    return f"hedge: {counts}{''.join(shunned)}"


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
    answer = post(url, "/admin/preempt", {"instance": instance, "grace_s": 0.0 if now else grace})
    if as_json:
        console.print_json(data=answer)
    elif now:
        console.print(f"{instance} is gone")
    else:
        console.print(f"{instance} has its notice and will be killed in {grace:g} s")


@app.command()
def reshape(
    shape: Annotated[
        str,
        typer.Argument(
            metavar="D,P,M",
            help="Replicas, pipeline stages, tensor shards; D may be 'auto'. 'auto' alone: the planner chooses.",
            show_default=False,
        ),
    ],
    wait: Annotated[bool, typer.Option(help="Return only when the new shape serves and the old one is gone.")] = True,
    url: UrlOption = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer, and what was moved, as JSON.")] = False,
) -> None:
    """Change the shape of a running system: it serves on while its weights and its sequences move."""
    data, pipeline, tensor = parse_shape("", shape)
    known_epochs = {item["epoch"] for item in get(url, "/status")["migrations"]}
    last_event = max((event["seq"] for event in get(url, "/admin/events")["events"]), default=0)
    answer = post(url, "/admin/reshape", {"data": data, "pipeline": pipeline, "tensor": tensor})
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
            events = get(url, f"/admin/events?after={last_event}")["events"]
            failed = [event for event in events if event["kind"] == "failed"]
            if failed:
                raise SpotServeError(f"the new shape was given up: {failed[-1]['reason']}")
            if sum(event["kind"] == "reshape" for event in events) > 1:
                raise SpotServeError("another shape was asked for meanwhile")
            document = get(url, "/status")
            if _has_settled(document):
                return document
            shown.update("; ".join(f"{item['id']} {item['state']}" for item in document["replicas"]))
            time.sleep(0.1)
    raise SpotServeError(f"the new shape does not serve after {RESHAPE_TIMEOUT_S:.0f} s: see `spotserve status --url {url}`")


def _has_settled(status: dict[str, Any]) -> bool:
    """Whether replicas of the wanted shape serve, as many as are wanted, and no others are there."""
    shape = status["shape"]
    if shape["pipeline"] is None:
        return bool(status["replicas"]) and all(item["state"] == "serving" for item in status["replicas"])
    parallel = {"pipeline": shape["pipeline"], "tensor": shape["tensor"]}
    devices = sum(item["devices"] for item in status["instances"] if item["state"] == "ready")
    fitting = devices // (shape["pipeline"] * shape["tensor"])
    wanted = fitting if shape["data"] is None else shape["data"]
    replicas = status["replicas"]
    return len(replicas) == wanted > 0 and all(item["state"] == "serving" and item["parallel"] == parallel for item in replicas)
