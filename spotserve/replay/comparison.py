"""Two replays held against each other: number by number, with intervals where both were repeated, and a word on what was not the
same for both. Each is a folder, simulated or live, or one policy of it: `FOLDER:POLICY`.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spotserve.core.errors import ConfigError
from spotserve.replay.intervals import Contrast, contrast

FIDELITY = (
    *(f"{name}_p{percent}_s" for name in ("ttft", "tpot", "e2e") for percent in (50, 90, 99)),
    "goodput_share",
    "goodput_requests_per_s",
    "tokens_per_s",
    "requests_lost",
    "requests_moved",
    "requests_resumed",
)
"""Numbers by which a simulated replay is held against a live one."""

KEY_OPTIONS = (
    "model",
    "machine",
    "delays",
    "max_batch",
    "step_tokens",
    "draft",
    "rents",
    "falls_back",
    "objectives",
    "limits",
    "prices",
    "reading",
)
"""What makes two simulated replays different things, besides traces, policy and rate."""
_KEY_SCALING = ("start_s", "duration_s", "time_scale", "grace_s", "notice_share", "seed")


@dataclass(frozen=True, slots=True)
class Compared:
    """One number of both."""

    name: str
    first: float | None
    second: float | None
    difference: float | None
    """First - second."""
    ratio: float | None
    """First over second."""
    contrast: Contrast | None = None
    """The same with intervals, over paired repeats; None: they were not repeated alike."""

    @property
    def error_percent(self) -> float | None:
        """How far the first is off the second; None: one is missing, or there is nothing to be off from."""
        if self.difference is None or self.second is None:
            return None
        if self.second == 0:
            return 0.0 if self.difference == 0 else None
        return 100 * self.difference / self.second


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of them."""

    first: str
    second: str
    rows: tuple[Compared, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        rows = [{**asdict(row), "error_percent": row.error_percent} for row in self.rows]
        return {"first": self.first, "second": self.second, "metrics": rows, "warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two, as its folder has it."""

    summary: Mapping[str, float | None]
    config: Mapping[str, Any]
    repeats: Sequence[Mapping[str, float | None]]
    """Empty: the folder does not have them apart."""


def compare_folders(first: str, second: str, *, only_fidelity: bool = False) -> Comparison:
    """Compares two folders of replays, or policies of them.

    Raises:
        ConfigError: one is no folder of a replay, has several policies of which none is named, or not the one that is.
    """
    one, other = _read(first), _read(second)
    names = [name for name in (FIDELITY if only_fidelity else one.summary) if name in one.summary and name in other.summary]
    warnings = _differences(one.config, other.config)
    is_paired = len(one.repeats) == len(other.repeats) > 1 and not any("trace" in told or "seed" in told for told in warnings)
    rows = (_compared(name, one, other, is_paired=is_paired) for name in names)
    return Comparison(first, second, tuple(rows), tuple(warnings))


def _compared(name: str, one: _Side, other: _Side, *, is_paired: bool) -> Compared:
    first, second = one.summary[name], other.summary[name]
    if first is None or second is None:
        return Compared(name, first, second, None, None)
    found: Contrast | None = None
    if is_paired:
        pairs = [(b.get(name), a.get(name)) for a, b in zip(one.repeats, other.repeats, strict=True)]
        known = [(b, a) for b, a in pairs if b is not None and a is not None]
        if len(known) == len(pairs):
            found = contrast([b for b, _ in known], [a for _, a in known])
    return Compared(name, first, second, first - second, first / second if second else None, found)


def _read(text: str) -> _Side:
    folder, _, policy = text.rpartition(":") if ":" in text and not Path(text).is_dir() else (text, "", "")
    path = Path(folder) / "summary.json"
    try:
        found = json.loads(path.read_bytes())
        config = json.loads((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{text}: expected the folder of a replay, with summary.json and config.json: {error}") from error
    if not isinstance(found, dict) or not isinstance(config, dict) or not found:
        raise ConfigError(f"{path}: expected an object of numbers")
    rows = _rows(Path(folder) / "summary.csv")
    if all(isinstance(value, dict) for value in found.values()):
        if not policy:
            raise ConfigError(f"{text}: several were played; name one: {', '.join(f'{folder}:{name}' for name in found)}")
        if policy not in found:
            raise ConfigError(f"{text}: there is no {policy}; there are {', '.join(found)}")
        found = found[policy]
        rows = [row for row in rows if row["case"] == policy]
    elif policy and policy not in {row["policy"] for row in rows}:
        raise ConfigError(f"{text}: there is no {policy}; there is {', '.join({str(row['policy']) for row in rows}) or folder}")
    summary = {name: value for name, value in found.items() if value is None or isinstance(value, int | float)}
    return _Side(summary, config, [{name: _number(value) for name, value in row.items()} for row in rows])


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of summary.csv; older folders have none."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What was not the same for both, of what both say."""
    told = []
    mine, theirs = ({Path(name).name: checksum for name, checksum in side.get("traces", {}).items()} for side in (one, other))
    told += [f"trace {name}" for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    first, second = one.get("options", {}), other.get("options", {})
    for name in KEY_OPTIONS:
        if name in first and name in second and first[name] != second[name]:
            told.append(f"{name}: {_short(first[name], second[name])}")
    for name in _KEY_SCALING:
        pair = [side.get("scaling", {}).get(name) for side in (first, second)]
        if pair[0] != pair[1]:
            told.append(f"{name}: {pair[0]} and {pair[1]}")
    return told


def _short(first: Any, second: Any) -> str:
    """Of two sections only what differs in them."""
    if isinstance(first, dict) and isinstance(second, dict):
        names = [name for name in first if first.get(name) != second.get(name)]
        return ", ".join(f"{name} {first.get(name)} and {second.get(name)}" for name in names)
    return f"{first} and {second}"
