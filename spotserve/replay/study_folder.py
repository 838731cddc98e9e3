"""The folder of a study: everything needed to know what was played, to judge it again and to play it again.

config.json             the resolved options, seed, checksums of the traces, the command, versions
summary.json            flat numbers, units in the names: means over repeats; of several policies or rates by their name
intervals.json          where there are repeats: of every mean, both ends of its 95 % interval
summary.csv             a row for each run, a column for each number
report.txt, report.html what was printed, and pictures
POLICY[@RATEx][-K]/     of every run: requests.jsonl, requests.csv, events.jsonl

Equal options give equal bytes, but for versions and platform in config.json: no times, no folders.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from spotserve.replay.case import Case
from spotserve.replay.intervals import as_json
from spotserve.replay.study import StudyOptions
from spotserve.replay.summary import Summary
from spotserve.replay.tables import package_version, write_json, write_summaries

_NOT_TOLD = ("capacity", "requests", "model", "machine", "jobs")


def config_of(options: StudyOptions, command: str) -> dict[str, Any]:
    """What was played."""
    kept = {name: value for name, value in asdict(options).items() if name not in _NOT_TOLD}
    del kept["scaling"]["rate_scale"]
    return {
        "options": {
            "capacity": [path.name for path in options.capacity],
            "requests": options.requests.name,
            "model": options.model.name,
            "machine": options.machine.name,
            **kept,
        },
        "command": command,
        "seed": options.scaling.seed,
        "traces": {path.name: sha256(path.read_bytes()).hexdigest() for path in (*options.capacity, options.requests)},
        "versions": {"spotserve": package_version(), "python": platform.python_version()},
        "platform": platform.platform(),
    }


def summary_of(cases: Sequence[Case]) -> Summary | dict[str, Summary]:
    """Numbers as they are in summary.json: flat, or by case where there are several."""
    return cases[0].summary if len(cases) == 1 else {case.name: case.summary for case in cases}


def write_study(folder: Path, cases: Sequence[Case], *, config: Mapping[str, Any], text: str, page: str) -> None:
    """Writes all but the rows of the runs, which are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", summary_of(cases))
    if any(case.intervals for case in cases):
        write_json(folder / "intervals.json", {case.name: as_json(case.intervals) for case in cases})
    write_summaries(folder / "summary.csv", cases)
    (folder / "report.txt").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8")
