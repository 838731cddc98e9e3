"""Public spot traces as loss histories: who was there, who was taken, when. For benchmarks of hazards and hedges.

A file of counts does not say which instance went; since nothing here depends on it, the oldest goes first. A count hides loss and
gain in the same tick.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from spotserve.replay.formats import parse_capacity, read_trace_text

_HOURS_IN = "p2-xlarge-2020-11-20-to"
"""The one file whose first column is hours; the others of its folder have seconds."""


@dataclass(frozen=True, slots=True)
class Change:
    """One instance came or was taken."""

    at_s: float
    instance_id: str
    is_loss: bool


@dataclass(frozen=True, slots=True)
class Series:
    """One zone's history, oldest first."""

    name: str
    changes: tuple[Change, ...]

    @property
    def end_s(self) -> float:
        """Time of the last change."""
        return self.changes[-1].at_s

    def counts(self) -> list[tuple[float, int]]:
        """(time, instances from then on), one row per moment of change."""
        rows: dict[float, int] = {}
        count = 0
        for change in self.changes:
            count += -1 if change.is_loss else 1
            rows[change.at_s] = count
        return list(rows.items())


def data_folder() -> Path | None:
    """Where the public traces lie: `$SPOTSERVE_DATA`, else `../shared/data` beside the checkout; None: nowhere."""
    told = os.environ.get("SPOTSERVE_DATA")
    folder = Path(told) if told else Path(__file__).resolve().parents[2] / "shared/data"
    return folder if (folder / "traces/spot/bamboo").is_dir() else None


def public_series(folder: Path) -> list[Series]:
    """Every independent public series that is there: Bamboo's (NSDI'23) G4dn, GCP A100, g4dn.xlarge and p2.xlarge."""
    bamboo = folder / "traces/spot/bamboo"
    text = read_trace_text(bamboo / "g4dn-trace.csv")
    events = parse_capacity(text, "g4dn-trace.csv").events
    found = [Series("AWS G4dn", tuple(Change(each.time_s, each.instance, each.change == "remove") for each in events))]
    found.append(_from_counts("GCP A100", _gcp_rows(bamboo / "gcloud/a100x1-east1b.txt")))
    for path in sorted((bamboo / "doc-data").glob("*.csv")):
        scale_s = 3600.0 if _HOURS_IN in path.name else 1.0
        rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        name = path.name.removeprefix("aws-spot-instances-").split("-2020")[0]
        found.append(_from_counts(f"AWS {name}", [(float(at) * scale_s, int(float(count))) for at, count in rows]))
    return found


def _gcp_rows(path: Path) -> list[tuple[float, int]]:
    rows = [[field.strip() for field in line.split(",")] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    times = [datetime.strptime(f"{day} {hour}", "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp() for day, hour, _ in rows]
    return [(at - times[0], int(row[2])) for at, row in zip(times, rows, strict=True)]


def _from_counts(name: str, rows: list[tuple[float, int]]) -> Series:
    changes: list[Change] = []
    alive: list[str] = []
    number = 0
    for at_s, count in rows:
        while len(alive) > count:
            changes.append(Change(at_s, alive.pop(0), is_loss=True))
        while len(alive) < count:
            number += 1
            alive.append(f"i-{number}")
            changes.append(Change(at_s, alive[-1], is_loss=False))
    return Series(name, tuple(changes))
