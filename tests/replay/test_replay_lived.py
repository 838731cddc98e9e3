"""A live run in the form of a replay, and the folder and page that come of it."""

import csv
import json
from pathlib import Path

import pytest
from test_replay_summary import PRICES, RUN

from spotserve.replay.folder import write_folder
from spotserve.replay.live_report import full_summary, live_cases
from spotserve.replay.lived import lived
from spotserve.replay.measures import measure, metric_names
from spotserve.replay.summary import Objectives, summarise


def test_by_hand() -> None:
    found = lived(RUN, PRICES, seed=3)
    assert (found.duration_s, found.ended_s, found.seed, found.policy) == (100.0, 100.0, 3, "spotserve")
    by_index = {outcome.index: outcome for outcome in found.outcomes}
    first = by_index[0]
    assert (first.arrival_s, first.first_token_s, first.end_s, first.tokens, first.is_whole) == (0.0, 1.0, 4.0, 5, True)
    assert (first.longest_gap_s, first.longest_gap_end_s) == (2.0, 4.0)
    assert by_index[1].moved == 2 and by_index[1].resumed == 0 and by_index[1].was_interrupted
    assert not by_index[3].is_whole and by_index[3].first_token_s == pytest.approx(80.5) and by_index[3].tokens == 2
    assert by_index[4].first_token_s is None and by_index[4].end_s == 91.0
    assert [outcome.end_s for outcome in found.outcomes] == sorted(outcome.end_s for outcome in found.outcomes)
    lost = [(event.time_s, event.instance, event.details["notice"]) for event in found.fleet_events if event.kind == "lost"]
    assert lost == [(21.5, "a", True), (52.0, "b", False)]
    assert sorted((lease.instance, lease.from_s, lease.until_s) for lease in found.leases) == [
        ("a", 0.0, 21.5),
        ("b", 0.0, 52.0),
        ("c", 30.0, 100.0),
    ]


def test_gaps_are_pooled_and_tokens_that_come_together_are_no_time_apart() -> None:
    gaps = lived(RUN, PRICES).gaps
    assert gaps.total == sum(max(0, len(record.token_ids) - 1) for record in RUN.requests)
    assert gaps.zeros == 2 and gaps.percentile_s(100) == pytest.approx(7.0, rel=0.003)


def test_both_ways_to_compute_a_number_agree() -> None:
    objectives = Objectives(ttft_s=0.6, tpot_s=1.5)
    ours, theirs = measure(lived(RUN, PRICES), objectives), summarise(RUN, prices=PRICES, objectives=objectives)
    both = ours.keys() & theirs.keys() - {"tokens_recomputed"}  # the system counts these, not its clients
    assert len(both) > 20
    assert {key: ours[key] for key in both} == pytest.approx({key: theirs[key] for key in both})


def test_what_a_client_cannot_see_is_not_told() -> None:
    found = full_summary(RUN, prices=PRICES, objectives=Objectives())
    assert found["available_share"] is found["recovery_mean_s"] is None and found["tokens_recomputed"] == 12
    assert set(metric_names()) <= set(found)


def test_the_folder_of_a_live_run_has_what_that_of_a_simulated_one_has(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("x\n")
    summary = full_summary(RUN, prices=PRICES, objectives=Objectives())
    runs = {"with preemptions": (RUN, summary), "steady": (RUN, summary)}
    out, options = tmp_path / "out", {"seed": 1}
    write_folder(out, options=options, traces=[trace], runs=runs, judged="with preemptions", report="r", prices=PRICES)
    page = (out / "report.html").read_text()
    assert "with preemptions" in page and "tokens contradicted" in page and str(tmp_path) not in page
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert [row["policy"] for row in rows] == ["with preemptions", "steady"]
    requests = list(csv.DictReader((out / "requests.csv").read_text().splitlines()))
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert len(requests) == len(lines) == 5 and "verdict" in lines[0] and "e2e_s" in requests[0]
    assert [case.sketch.length_s for case in live_cases(runs, PRICES)] == [100.0, 100.0]
