"""Files that folders of simulated and of live replays have alike."""

import csv
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from spotserve.replay.case import Case


def write_summaries(path: Path, cases: Sequence[Case]) -> None:
    """A row for each run."""
    names = list(dict.fromkeys(name for case in cases for summary in case.summaries for name in summary))
    with path.open("w", encoding="utf-8", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["case", "policy", "rate_scale", "repeat", *names])
        for case in cases:
            for repeat, summary in enumerate(case.summaries):
                writer.writerow([case.name, case.policy, case.rate_scale, repeat, *(summary.get(name) for name in names)])


def package_version() -> str:
    """Of this program."""
    try:
        return version("spotserve")
    except PackageNotFoundError:
        return "not installed"


def write_json(path: Path, content: object) -> None:
    """Readable, in the order of what is written."""
    path.write_text(json.dumps(content, indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8")
