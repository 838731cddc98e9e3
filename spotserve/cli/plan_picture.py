"""A plan for people: what runs where, what it would be like, what lost and why, and what moves when.

Invariant: nothing is lost to a narrow terminal: cells fold, and long lists end with how many more there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

REPLICAS_SHOWN = 24
MACHINES_SHOWN = 12
LOSERS_SHOWN = 4
TRANSFERS_SHOWN = 8
WIDEST_BAR = 48
"""Characters of the time axis at most; what else is in its row takes `BESIDE_BAR`."""
BESIDE_BAR = 40


def show(document: dict[str, Any], devices_of: Mapping[str, int], console: Console) -> None:
    """Prints a document of `plan_document`; `devices_of` says how many devices each machine has."""
    console.print(_headline(document, len(devices_of)))
    console.print(_figures(document))
    if document["replicas"]:
        console.print(_placement(document, devices_of))
    else:
        for loser in document.get("losers", [])[:LOSERS_SHOWN]:
            console.print(Text(f"  {loser}", style="dim"))
    if document["alternatives"]:
        console.print(_alternatives(document))
    if document["transfers"]:
        console.print(_arrivals(document, max(8, min(WIDEST_BAR, console.width - BESIDE_BAR))))
        console.print(_transfers(document))
    if told := document.get("bytes_from_files"):
        console.print(_from_files(told))


def _headline(document: dict[str, Any], num_machines: int) -> Text:
    shapes = [f"{each['pipeline']} x {each['tensor']}" for each in document["replicas"]]
    counted = ", ".join(f"{shapes.count(shape)} of {shape}" for shape in dict.fromkeys(shapes))
    told = f"replicas of stages x shards: {counted}" if shapes else "nothing can run"
    machines = f"{num_machines} machine{'' if num_machines == 1 else 's'}"
    return Text.assemble((document["model"], "bold"), f" on {machines}, policy {document['policy']}: {told}")


def _figures(document: dict[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    if document["latency_s"] is not None:
        seconds = [("mean", document["latency_s"]), ("p99", document.get("e2e_p99_s"))]
        seconds += [("first token p99", document.get("ttft_p99_s")), ("each further p99", document.get("tpot_p99_s"))]
        grid.add_row("  latency", ", ".join(f"{name} {_seconds(value)}" for name, value in seconds if value is not None))
    asked = document["rate_rps"]
    if document["replicas"]:
        serves = Text(f"{document['throughput_rps']:.3g} requests/s, asked for {asked:g}")
        if document["throughput_rps"] < asked:
            serves.append(": too little, queues grow or limits are missed", style="red")
        grid.add_row("  serves", serves)
        grid.add_row("  costs", f"{document['cost_usd_per_hour']:.2f} USD/h for the machines that are used")
    grid.add_row("  why", Text(document["reason"]))
    return grid


def _placement(document: dict[str, Any], devices_of: Mapping[str, int]) -> Table:
    """A row for each replica, its stages from left to right."""
    table = _table("what runs where", "replica", "stages x shards", "batch", "devices, stage by stage")
    for replica in document["replicas"][:REPLICAS_SHOWN]:
        shape = f"{replica['pipeline']} x {replica['tensor']}"
        table.add_row(replica["id"], shape, str(replica["batch"]), Text(" > ".join(_stages(replica))))
    if (more := len(document["replicas"]) - REPLICAS_SHOWN) > 0:
        table.add_row(f"... {more} more")
    lost = document.get("lost", [])
    used = {device for each in document["replicas"] for device in each["devices"]}
    there = [f"{machine}/{index}" for machine, count in devices_of.items() if machine not in lost for index in range(count)]
    for name, devices in (("idle", [each for each in there if each not in used]), ("lost", lost)):
        if devices:
            table.add_row(Text(name, style="dim"), "", "", Text(_listed(tuple(in_short(devices))), style="dim"))
    return table


def _stages(replica: dict[str, Any]) -> Iterator[str]:
    """Devices of each stage, and its layers where not all have as many."""
    layers = replica.get("stage_layers", [])
    is_even = len(set(layers)) <= 1
    for stage in range(replica["pipeline"]):
        devices = replica["devices"][stage * replica["tensor"] : (stage + 1) * replica["tensor"]]
        yield " ".join(in_short(devices)) + ("" if is_even else f" ({layers[stage]} layers)")


def in_short(names: Sequence[str]) -> Iterator[str]:
    """Devices `i-1/0`, `i-1/1`, `i-1/2`, `i-2/0` as `i-1/0-2`, `i-2/0`; machines as they are."""
    for machine, members in groupby((name.partition("/") for name in names), key=lambda each: each[0]):
        indices = [index for _, _, index in members if index]
        if not indices:
            yield machine
        for _, run in groupby(enumerate(map(int, indices)), key=lambda each: each[1] - each[0]):
            first, *rest = [index for _, index in run]
            yield f"{machine}/{first}-{rest[-1]}" if rest else f"{machine}/{first}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MACHINES_SHOWN
    return " ".join(names[:MACHINES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _alternatives(document: dict[str, Any]) -> Table:
    is_changing = any(each["change_s"] for each in document["alternatives"])
    change = ["change"] if is_changing else []
    table = _table("plans that lost", "instead", "p99", "requests/s", "USD/h", *change, "why not")
    for each in document["alternatives"]:
        p99 = "never" if each["e2e_p99_s"] is None else _seconds(each["e2e_p99_s"])
        figures = [p99, f"{each['throughput_rps']:.3g}", f"{each['cost_usd_per_hour']:.2f}"]
        if is_changing:
            figures.append(f"{_seconds(each['change_s'])}, {_size(each['bytes_moved'])}" if each["change_s"] else "-")
        table.add_row(Text(each["replicas"]), *figures, Text(each["why"]))
    return table


def _arrivals(document: dict[str, Any], width: int) -> Table:
    """What arrives at each machine over time."""
    makespan_s = document["makespan_s"]
    least = _size(document["bytes_lower_bound"]), _seconds(document["makespan_lower_bound_s"])
    moved = f"{_size(document['bytes_moved'])} (at least {least[0]})"
    title = f"{len(document['transfers'])} transfers: {moved} in {_seconds(makespan_s)} (at least {least[1]})"
    end = _seconds(makespan_s)
    table = _table(title, "to", Column(f"0 s{end:>{width - 3}}", no_wrap=True), "bytes")
    arriving: dict[str, list[dict[str, Any]]] = {}
    for each in document["transfers"]:
        arriving.setdefault(each["to"].partition("/")[0], []).append(each)
    for machine, transfers in list(arriving.items())[:MACHINES_SHOWN]:
        busy = [" "] * width
        for each in transfers:
            first = min(width - 1, int(each["start_s"] / makespan_s * width))
            last = max(first + 1, int(each["end_s"] / makespan_s * width))
            busy[first:last] = "#" * (min(width, last) - first)
        table.add_row(machine, "".join(busy), _size(sum(each["bytes"] for each in transfers)))
    if (more := len(arriving) - MACHINES_SHOWN) > 0:
        table.add_row(f"... {more} more")
    return table


def _transfers(document: dict[str, Any]) -> Table:
    table = _table("the first of them", "what", "from", "to", "bytes", "start", "end")
    for each in document["transfers"][:TRANSFERS_SHOWN]:
        times = (_seconds(each["start_s"]), _seconds(each["end_s"]))
        table.add_row(Text(each["what"]), each["from"], each["to"], _size(each["bytes"]), *times)
    if (more := len(document["transfers"]) - TRANSFERS_SHOWN) > 0:
        table.add_row(f"... {more} more")
    return table


def _from_files(num_bytes: Mapping[str, int]) -> Text:
    """Machines that read as much are told together."""
    alike: dict[str, list[str]] = {}
    for machine, each in num_bytes.items():
        alike.setdefault(_size(each), []).append(machine)
    told = "; ".join(f"{size} on {'each of ' if len(names) > 1 else ''}{_listed(names)}" for size, names in alike.items())
    return Text(f"  weights read from files: {told}")


def _table(title: str, *columns: str | Column) -> Table:
    return Table(*columns, title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if 0 < seconds < 1 else f"{seconds:.3g} s"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
