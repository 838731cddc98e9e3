"""A plan for people: what runs where, what it would be like, what lost and why, and what moves when."""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green", "bright_yellow", "bright_magenta")
MACHINES_SHOWN = 48
TRANSFERS_SHOWN = 12
BAR = 48
"""Characters of the time axis."""


def show(document: dict[str, Any], devices_of: dict[str, int], console: Console) -> None:
    """Prints a document of `plan_document`; `devices_of` says how many devices each machine has."""
    console.print(_headline(document))
    if document["replicas"]:
        console.print(_placement(document, devices_of))
    for loser in document.get("losers", [])[:6]:
        console.print(f"  [dim]{escape(loser)}[/]")
    if document["alternatives"]:
        console.print(_alternatives(document))
    if document["transfers"]:
        console.print(_transfers(document))


def _headline(document: dict[str, Any]) -> str:
    shapes = [f"{each['pipeline']} x {each['tensor']}" for each in document["replicas"]]
    counted = ", ".join(f"{shapes.count(shape)} of {shape}" for shape in dict.fromkeys(shapes)) or "none"
    told = [f"[bold]{escape(document['model'])}[/], policy {document['policy']}: replicas of stages x shards: {counted}"]
    figures = [("mean latency", document["latency_s"], "s"), ("p99", document.get("e2e_p99_s"), "s")]
    figures += [("TTFT p99", document.get("ttft_p99_s"), "s"), ("TPOT p99", document.get("tpot_p99_s"), "s")]
    figures += [("throughput", document["throughput_rps"], "requests/s"), ("cost", document["cost_usd_per_hour"], "USD/h")]
    told.append("  " + "   ".join(f"{name} {value:.4g} {unit}" for name, value, unit in figures if value is not None))
    if document.get("reason"):
        told.append(f"  [dim]{escape(document['reason'])}[/]")
    return "\n".join(told)


def _placement(document: dict[str, Any], devices_of: dict[str, int]) -> Table:
    """A row for each machine, a cell for each device: replica, stage and shard."""
    cells: dict[str, Text] = {}
    for number, replica in enumerate(document["replicas"]):
        for place, device in enumerate(replica["devices"]):
            stage, shard = divmod(place, replica["tensor"])
            cells[device] = Text(f"{replica['id']}.{stage}.{shard}", style=COLOURS[number % len(COLOURS)])
    widest = max(devices_of.values())
    table = Table(
        "machine", *(str(index) for index in range(widest)), title="replica.stage.shard on each device", title_justify="left"
    )
    for machine, count in list(devices_of.items())[:MACHINES_SHOWN]:
        free = Text("-", style="dim")
        table.add_row(machine, *(cells.get(f"{machine}/{index}", free) for index in range(count)))
    if len(devices_of) > MACHINES_SHOWN:
        table.add_row(f"... {len(devices_of) - MACHINES_SHOWN} more")
    return table


def _alternatives(document: dict[str, Any]) -> Table:
    table = Table("instead", "p99", "requests/s", "USD/h", "change", "why not", title="plans that lost", title_justify="left")
    for each in document["alternatives"]:
        p99 = "never" if each["e2e_p99_s"] is None else f"{each['e2e_p99_s']:.3g} s"
        change = "-" if each["change_s"] == 0 else f"{each['change_s']:.3g} s, {_size(each['bytes_moved'])}"
        figures = (p99, f"{each['throughput_rps']:.3g}", f"{each['cost_usd_per_hour']:.2f}", change)
        table.add_row(escape(each["replicas"]), *figures, escape(each["why"]))
    return table


def _transfers(document: dict[str, Any]) -> RenderableType:
    """What arrives at each machine over time, and the first transfers by name."""
    makespan_s = document["makespan_s"]
    bars = Table("to", f"0 s {' ' * (BAR - 16)} {makespan_s:.3g} s", "bytes", title_justify="left")
    bars.title = (
        f"{len(document['transfers'])} transfers, {_size(document['bytes_moved'])} (bound {_size(document['bytes_lower_bound'])}) "
        f"in {makespan_s:.3g} s (bound {document['makespan_lower_bound_s']:.3g} s)"
    )
    arriving: dict[str, list[dict[str, Any]]] = {}
    for each in document["transfers"]:
        arriving.setdefault(each["to"].partition("/")[0], []).append(each)
    for machine, transfers in sorted(arriving.items())[:MACHINES_SHOWN]:
        busy = [" "] * BAR
        for each in transfers:
            first = int(each["start_s"] / makespan_s * BAR) if makespan_s else 0
            last = int(each["end_s"] / makespan_s * BAR) if makespan_s else 0
            for column in range(first, min(BAR, max(first + 1, last))):
                busy[column] = "#"
        bars.add_row(machine, "".join(busy), _size(sum(each["bytes"] for each in transfers)))
    listed = Table("what", "from", "to", "bytes", "start", "end", title="the first of them", title_justify="left")
    for each in document["transfers"][:TRANSFERS_SHOWN]:
        times = (f"{each['start_s']:.3f} s", f"{each['end_s']:.3f} s")
        listed.add_row(each["what"], each["from"], each["to"], _size(each["bytes"]), *times)
    return Group(bars, listed)


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
