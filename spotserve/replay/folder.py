"""The folder of a live run: everything needed to know what was run, to judge it again and to run it again.

config.json             the resolved options, versions, seed, and checksums of the traces
summary.json            flat numbers, units in the names
summary.csv             the same as a table, a row for each pass
requests.jsonl          one request a line, tokens and event times included
requests.csv            the same in short, with the columns of a simulated run
events.jsonl            what the fleet reported and what the replay did to it, by time
report.txt, report.html what was printed, and pictures
"""

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from spotserve.config import LocalCloudSettings
from spotserve.replay.compare import Comparison
from spotserve.replay.live_report import live_cases, live_page
from spotserve.replay.lived import lived
from spotserve.replay.record import RunRecord
from spotserve.replay.run_files import write_requests
from spotserve.replay.summary import Summary
from spotserve.replay.tables import package_version, write_json, write_summaries


def write_folder(
    folder: Path,
    *,
    options: Mapping[str, object],
    traces: Iterable[Path],
    runs: Mapping[str, tuple[RunRecord, Summary]],
    judged: str,
    report: str,
    prices: LocalCloudSettings,
    comparisons: Iterable[Comparison] = (),
) -> None:
    """Writes a run's folder. `judged` is the run whose summary and rows it is about; the others go in with a prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    checksums = {path: sha256(path.read_bytes()).hexdigest() for path in traces}
    config = {
        "options": options,
        "versions": {"spotserve": package_version(), "python": platform.python_version()},
        "platform": platform.platform(),
        "traces": {str(path): checksum for path, checksum in checksums.items()},
    }
    write_json(folder / "config.json", config)
    verdicts = {comparison.index: comparison for comparison in comparisons}
    for name, (run, summary) in runs.items():
        prefix = "" if name == judged else f"{name.replace(' ', '-')}-"
        write_json(folder / f"{prefix}summary.json", summary)
        _write_lines(folder / f"{prefix}requests.jsonl", request_rows(run, verdicts if name == judged else {}))
        _write_lines(folder / f"{prefix}events.jsonl", event_rows(run))
    write_requests(folder, lived(runs[judged][0], prices).outcomes, with_lines=False)
    cases = live_cases(runs, prices)
    write_summaries(folder / "summary.csv", cases)
    (folder / "report.txt").write_text(report, encoding="utf-8")
    (folder / "report.html").write_text(
        live_page(cases, options, {path.name: checksum for path, checksum in checksums.items()}), encoding="utf-8"
    )


def request_rows(run: RunRecord, verdicts: Mapping[int, Comparison]) -> Iterable[Mapping[str, object]]:
    """One row per request; times count from the start of the run."""
    for record in run.requests:
        comparison = verdicts.get(record.arrival.index)
        yield {
            **asdict(record),
            "scheduled_s": record.scheduled_s - run.started_s,
            "sent_s": record.sent_s - run.started_s,
            "ended_s": record.ended_s - run.started_s,
            "event_times_s": [round(at_s - run.started_s, 6) for at_s in record.event_times_s],
            "gaps": [round(gap, 9) for gap in record.gaps],
            "ttft_s": record.ttft_s,
            "tpot_s": record.tpot_s,
            "e2e_s": record.e2e_s,
            "verdict": comparison.verdict.value if comparison else None,
            "first_difference": comparison.position if comparison else None,
        }


def event_rows(run: RunRecord) -> Iterable[Mapping[str, object]]:
    """What the fleet reported and what the replay asked for, by time; times count from the start of the run."""
    rows: list[dict[str, object]] = [
        {"at_s": event.time_s - run.started_s, "source": "fleet", "kind": event.kind, "instance": event.instance, **event.details}
        for event in run.fleet_events
    ]
    for deed in run.deeds:
        did = {"kind": deed.action, "instance": deed.instance, "trace_instance": deed.trace_instance, "problem": deed.problem}
        rows.append({"at_s": deed.time_s - run.started_s, "source": "replay", **did})
    return sorted(rows, key=lambda row: float(str(row["at_s"])))


def _write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows), encoding="utf-8")
