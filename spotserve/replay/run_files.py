"""The rows of one simulated run: a line for each request and for each thing that happened to the fleet.

requests.jsonl, requests.csv    one request a line, in the order in which they ended
events.jsonl                    what happened to the fleet, by time
"""

import contextlib
import csv
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from spotserve.replay.outcome import Outcome, Outcomes, Replayed

_DIGITS = 6
"""Of seconds in rows: microseconds."""

COLUMNS = (*(field.name for field in fields(Outcome)), "ttft_s", "tpot_s", "e2e_s")


def write_run(folder: Path, replayed: Replayed) -> None:
    """Writes all rows of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_requests(folder, replayed.outcomes)
    with (folder / "events.jsonl").open("w", encoding="utf-8") as lines:
        for row in event_rows(replayed):
            lines.write(json.dumps(row, separators=(",", ":"), default=str) + "\n")


def write_requests(folder: Path, outcomes: Outcomes, *, with_lines: bool = True) -> None:
    """Requests as a table and, unless somebody else wrote more of them, as lines; in one go, for there may be half a million."""
    with (folder / "requests.csv").open("w", encoding="utf-8", newline="") as table, contextlib.ExitStack() as at_end:
        lines = at_end.enter_context((folder / "requests.jsonl").open("w", encoding="utf-8")) if with_lines else None
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(COLUMNS)
        for outcome in outcomes:
            row = outcome_row(outcome)
            writer.writerow(row.values())
            if lines is not None:
                lines.write(json.dumps(row, separators=(",", ":")) + "\n")


def outcome_row(outcome: Outcome) -> dict[str, Any]:
    """One request, with its latencies."""
    return {name: round(value, _DIGITS) if isinstance(value := getattr(outcome, name), float) else value for name in COLUMNS}


def event_rows(replayed: Replayed) -> Iterator[dict[str, Any]]:
    """What happened to the fleet."""
    for event in replayed.fleet_events:
        details = {name: round(each, _DIGITS) if isinstance(each, float) else each for name, each in event.details.items()}
        yield {"at_s": round(event.time_s, _DIGITS), "kind": event.kind, "instance": event.instance, **details}
