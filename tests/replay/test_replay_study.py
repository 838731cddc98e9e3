"""Studies: what a repeat plays, that the number of processes does not matter, and the folder that is left."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from played_scene import POLICIES, study_options

from spotserve.core.errors import ConfigError
from spotserve.replay import policies as registry
from spotserve.replay.intervals import means
from spotserve.replay.page import Facts, page
from spotserve.replay.study import (
    Part,
    StudyOptions,
    cases_of,
    clamped,
    num_clamped,
    parts_of,
    play_all,
    policies_told,
    read_traces,
    run_name,
    scenario_of,
    turned,
)
from spotserve.replay.study_folder import config_of, summary_of, write_study
from spotserve.replay.timeline import Arrive, Take, Timeline


@pytest.fixture(autouse=True)
def quick_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "POLICIES", POLICIES)


def run(options: StudyOptions, out: Path) -> dict[str, bytes]:
    """Plays a study; the files of its folder."""
    results = play_all(options, folder=out, on_result=lambda result: None)
    cases = cases_of(options, results)
    facts = Facts(title="t", described="d", command="c", config={}, policies=policies_told(options))
    write_study(out, cases, config=config_of(options, "c"), text="text\n", page=page(cases, facts))
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_files_are_the_same_whatever_the_folder_and_the_number_of_processes(tmp_path: Path) -> None:
    files = [
        run(study_options(tmp_path / place, policies=("quick", "slow"), repeats=2, jobs=jobs), tmp_path / place / "out")
        for place, jobs in (("one", 1), ("two", 2))
    ]
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in b"".join(files[0].values())
    runs = {f"{policy}-{repeat}/{name}" for policy in ("quick", "slow") for repeat in (0, 1) for name in ROWS}
    assert set(files[0]) == {"config.json", "summary.json", "intervals.json", "summary.csv", "report.txt", "report.html", *runs}


ROWS = ("requests.jsonl", "requests.csv", "events.jsonl")


def test_one_run_has_a_flat_summary(tmp_path: Path) -> None:
    files = run(study_options(tmp_path), tmp_path / "out")
    assert set(files) == {"config.json", "summary.json", "summary.csv", "report.txt", "report.html", *(f"quick/{n}" for n in ROWS)}
    summary = json.loads(files["summary.json"])
    assert summary["requests_total"] == 50 and all(value is None or isinstance(value, int | float) for value in summary.values())
    (row,) = csv.DictReader(files["summary.csv"].decode().splitlines())
    assert float(row["e2e_p99_s"]) == summary["e2e_p99_s"] and (row["policy"], row["repeat"]) == ("quick", "0")
    lines = [json.loads(line) for line in files["quick/requests.jsonl"].splitlines()]
    table = list(csv.DictReader(files["quick/requests.csv"].decode().splitlines()))
    assert len(lines) == len(table) == 50 and list(lines[0]) == list(table[0])
    assert [float(row["end_s"]) for row in table] == [line["end_s"] for line in lines]
    events = [json.loads(line) for line in files["quick/events.jsonl"].splitlines()]
    assert sum(event["kind"] == "lost" for event in events) == summary["losses_with_notice"] == 3
    config = json.loads(files["config.json"])
    assert set(config["traces"]) == {"fleet.csv", "load.csv"} and config["options"]["model"] == "llama-3-8b"


def test_cases_are_policies_at_rates_and_numbers_their_means(tmp_path: Path) -> None:
    options = study_options(tmp_path, policies=("quick", "slow"), rate_scales=(1.0, 2.0), repeats=2)
    results = play_all(options, folder=None, on_result=lambda result: None)
    cases = cases_of(options, results)
    assert [case.name for case in cases] == ["quick@1x", "slow@1x", "quick@2x", "slow@2x"] == list(summary_of(cases))
    assert cases[0].summary == means(cases[0].summaries) and len(cases[0].summaries) == 2
    assert cases[0].intervals["e2e_mean_s"].mean == pytest.approx(cases[0].summary["e2e_mean_s"])
    assert [run_name(options, part) for part in parts_of(options)][:2] == ["quick@1x-0", "slow@1x-0"]
    scenarios = [scenario_of(options, *read_traces(options), rate_scale=rate, repeat=0) for rate in (1.0, 2.0)]
    assert [scenario.timeline.arrivals[-1].at_s for scenario in scenarios] == [98.0, 49.0]


def test_repeat_0_is_the_trace_and_others_turn_the_requests_against_the_fleet(tmp_path: Path) -> None:
    options = study_options(tmp_path, repeats=3, scaling=replace(study_options(tmp_path).scaling, notice_share=0.5))
    fleet, load = read_traces(options)
    timelines = [scenario_of(options, fleet, load, rate_scale=1.0, repeat=repeat).timeline for repeat in range(3)]
    assert [arrive.at_s for arrive in timelines[0].arrivals] == [request.arrival_s for request in load.requests]
    assert [[take.at_s for take in one.losses] for one in timelines] == [[30.0, 70.0, 100.0]] * 3
    assert len({tuple(arrive.at_s for arrive in one.arrivals) for one in timelines}) == 3
    assert len({tuple(take.noticed for take in one.losses) for one in timelines}) > 1
    again = scenario_of(options, fleet, load, rate_scale=1.0, repeat=2)
    assert again.timeline == timelines[2] and again.seed == 2


@given(st.lists(st.floats(0, 99), max_size=20), st.floats(0, 0.999))
def test_turning_keeps_gaps_and_requests(times_s: list[float], share: float) -> None:
    arrivals = [Arrive(at_s, index, 1 + index, 1, 0.0, index) for index, at_s in enumerate(sorted(times_s))]
    actions = sorted([*arrivals, Take(50.0, "a", noticed=False)], key=lambda action: action.at_s)
    found = turned(Timeline({"a": ""}, tuple(actions), 100.0), share)
    assert [arrive.index for arrive in found.arrivals] == list(range(len(times_s)))
    assert sorted(arrive.seed for arrive in found.arrivals) == list(range(len(times_s)))
    for arrive in found.arrivals:
        assert (arrive.at_s - arrivals[arrive.seed].at_s) % 100 == pytest.approx(share * 100, abs=1e-6) or share == 0
    assert list(found.actions) == sorted(found.actions, key=lambda action: action.at_s) and len(found.losses) == 1


def test_prompts_are_cut_to_what_the_model_takes() -> None:
    arrivals = (Arrive(0.0, 0, 10, 5, 0.0, 0), Arrive(1.0, 1, 100, 20, 0.0, 0), Arrive(2.0, 2, 5, 300, 0.0, 0))
    timeline = Timeline({}, arrivals, 10.0)
    assert num_clamped(timeline, 100) == 2
    assert [(a.prompt_tokens, a.output_tokens) for a in clamped(timeline, 100).arrivals] == [(10, 5), (80, 20), (1, 99)]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"policies": ("magic",)}, "expected one of quick, slow"),
        ({"repeats": 0}, "repeat=0"),
        ({"capacity": ()}, "capacity trace"),
    ],
)
def test_what_makes_no_sense_is_told(wrong: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        study_options(tmp_path, **wrong)


def test_a_part_without_requests_is_told(tmp_path: Path) -> None:
    options = study_options(tmp_path)
    fleet, load = read_traces(options)
    late = replace(options, scaling=replace(options.scaling, start_s=999.0))
    with pytest.raises(ConfigError, match="start_s=999"):
        scenario_of(late, fleet, load, rate_scale=1.0, repeat=0)


def test_results_are_told_as_they_come(tmp_path: Path) -> None:
    seen: list[Part] = []
    shown: list[int] = []
    options = study_options(tmp_path, repeats=2)
    play_all(options, folder=None, on_result=lambda result: seen.append(result.part), show=lambda *far: shown.append(far[1]))
    assert seen == parts_of(options) and shown[-1] == 50


def test_a_study_loads_no_tensors() -> None:
    heavy = ["torch", "transformers", "redis", "boto3"]
    program = f"import sys, spotserve.replay.study_folder, spotserve.cli.replays; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
