"""The summary's formulas against naive twins and by hand, and the report made of them."""

from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from spotserve.config import LocalCloudSettings
from spotserve.replay.compare import Comparison, Verdict
from spotserve.replay.preemptions import SETTLE_S, Preemption, longest_silences, preemptions, steady_silences
from spotserve.replay.record import Deed, FleetEvent, RequestRecord, RunRecord
from spotserve.replay.report import SECTIONS, bars, describe, picture, print_report
from spotserve.replay.summary import Objectives, fleet_steps, instance_seconds, percentile, summarise
from spotserve.replay.timeline import Arrive, GiveNotice, Launch, Take, Timeline

PRICES = LocalCloudSettings(spot_usd_per_hour=3.6, on_demand_usd_per_hour=36.0)


def request(index: int, sent_s: float, times_s: tuple[float, ...], tokens: tuple[int, ...] = (), **rest) -> RequestRecord:
    tokens = tokens or (1,) * len(times_s)
    return RequestRecord(
        **{
            "arrival": Arrive(sent_s, index, 5, max(1, sum(tokens)), 0.0, index),
            "scheduled_s": sent_s - 0.25,
            "sent_s": sent_s,
            "ended_s": times_s[-1] if times_s else sent_s + 1,
            "request_id": f"cmpl-{index}",
            "token_ids": tuple(range(sum(tokens))),
            "event_times_s": times_s,
            "event_tokens": tokens,
            "finish_reason": "length",
            **rest,
        }
    )


RUN = RunRecord(
    label="run",
    started_s=100.0,
    ended_s=200.0,
    initial_instances=("a", "b"),
    requests=(
        request(0, 100.0, (101.0, 102.0, 104.0), (1, 2, 2)),
        request(1, 119.0, (119.5, 120.0, 123.0, 123.5)),
        request(2, 150.0, (150.1, 151.1, 158.1, 158.2)),
        request(3, 180.0, (180.5, 181.0), finish_reason=None, error="gone"),
        request(4, 190.0, (), finish_reason=None, error="refused"),
    ),
    fleet_events=(
        FleetEvent(120.5, "notice", "a"),
        FleetEvent(120.6, "moved", "a", {"request_id": "cmpl-1"}),
        FleetEvent(120.7, "moved", "a", {"request_id": "cmpl-1"}),
        FleetEvent(121.5, "lost", "a"),
        FleetEvent(121.5, "lost", "a"),
        FleetEvent(130.0, "launched", "c"),
        FleetEvent(135.0, "ready", "c"),
        FleetEvent(140.0, "notice", "c"),
        FleetEvent(145.0, "undrained", "c"),
        FleetEvent(152.0, "lost", "b"),
    ),
    deeds=(Deed(1.0, "Take", "x", None, "refused"),),
    tokens_recomputed=12,
)


def test_by_hand() -> None:
    comparisons = (Comparison(0, Verdict.EQUAL), Comparison(1, Verdict.TIE_FLIP, 1, 0.0), Comparison(2, Verdict.ALTERED, 0, 1.0, 4))
    found = summarise(RUN, comparisons, prices=PRICES, objectives=Objectives(ttft_s=0.6, tpot_s=1.5))
    expected = {
        "duration_s": 100.0,
        "requests_total": 5,
        "requests_finished": 3,
        "requests_lost": 2,
        "requests_interrupted": 1,
        "requests_in_flight_at_losses": 2,
        "tokens_total": 15,
        "tokens_recomputed": 12,
        "preemptions_with_notice": 1,
        "preemptions_without_notice": 1,
        "capacity_actions_failed": 1,
        "requests_equal": 1,
        "requests_altered": 1,
        "tokens_altered": 4,
        "tie_flips": 1,
        "ttft_p50_s": 0.5,
        "ttft_p99_s": 1.0,
        "tpot_p50_s": 4.0 / 3,
        "tpot_p99_s": 2.7,
        "e2e_p50_s": 4.5,
        "schedule_delay_p99_s": 0.25,
        "longest_gap_s": 7.0,
        "gap_with_notice_p99_s": 3.0,
        "gap_without_notice_p99_s": 7.0,
        "gap_steady_max_s": 2.0,
        "tokens_per_s": 0.15,
        "goodput_requests_per_s": 0.01,
        "goodput_share": 0.2,
        "instance_seconds": 21.5 + 52.0 + 70.0,
        "cost_usd": 0.1435,
        "cost_on_demand_usd": 2.0,
        "usd_per_million_output_tokens": 0.1435 / 15 * 1e6,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_a_run_in_which_nothing_happened_has_no_numbers_it_cannot_have() -> None:
    empty = RunRecord(label="none", started_s=5.0, ended_s=5.0, initial_instances=(), requests=())
    found = summarise(empty, prices=PRICES)
    assert found["ttft_p99_s"] is found["longest_gap_s"] is found["goodput_share"] is found["tokens_altered"] is None
    assert found["tokens_recomputed"] is None and found["requests_total"] == found["cost_usd"] == 0
    print_report(Console(file=StringIO()), {"none": (empty, found)})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.1, 100))
def test_percentile_against_its_definition(values: list[float], percent: float) -> None:
    naive = min(
        candidate
        for candidate in values
        if 100 * sum(value <= candidate for value in values) >= percent * len(values) * (1 - 1e-12)
    )
    assert percentile(values, percent) == naive


@st.composite
def fleets(draw: st.DrawFn) -> RunRecord:
    """Fleets in whole seconds."""
    initial = tuple(f"i{n}" for n in range(draw(st.integers(0, 4))))
    alive, events, fresh = list(initial), [], 0
    for at_s in sorted(draw(st.lists(st.integers(0, 60), max_size=20))):
        if alive and draw(st.booleans()):
            events.append(FleetEvent(float(at_s), "lost", alive.pop(draw(st.integers(0, len(alive) - 1)))))
        else:
            fresh += 1
            alive.append(f"n{fresh}")
            events.append(FleetEvent(float(at_s), "launched", alive[-1]))
    return RunRecord(label="", started_s=0.0, ended_s=60.0, initial_instances=initial, requests=(), fleet_events=tuple(events))


@given(fleets())
def test_instance_seconds_against_counting_every_second(run: RunRecord) -> None:
    total = 0
    for second in range(60):
        present = set(run.initial_instances)
        for event in run.fleet_events:
            if event.time_s <= second:
                (present.add if event.kind == "launched" else present.discard)(str(event.instance))
        total += len(present)
    assert instance_seconds(run) == total
    assert all(size >= 0 for _, size in fleet_steps(run))


def test_preemptions_are_counted_once_and_withdrawn_notices_not() -> None:
    assert preemptions(RUN.fleet_events) == (Preemption("a", 120.5, 121.5), Preemption("b", None, 152.0))
    withdrawn = (FleetEvent(1.0, "notice", "x"), FleetEvent(2.0, "undrained", "x"), FleetEvent(3.0, "lost", "x"))
    assert preemptions(withdrawn) == (Preemption("x", None, 3.0),)
    assert preemptions(withdrawn)[0].window == (3.0, 3.0 + SETTLE_S)


def test_only_silences_that_overlap_the_window_count() -> None:
    noticed, sudden = preemptions(RUN.fleet_events)
    assert longest_silences(RUN.requests, noticed) == [3.0]
    assert longest_silences(RUN.requests, sudden) == [7.0]
    assert steady_silences(RUN) == pytest.approx([2.0, 0.5, 1.0, 0.5])


def test_tpot_leaves_the_first_token_out() -> None:
    whole = request(0, 0.0, (2.0, 5.0), (1, 3))
    assert (whole.ttft_s, whole.e2e_s, whole.tpot_s) == (2.0, 5.0, 1.0)
    assert replace(whole, finish_reason=None).tpot_s is None and request(0, 0.0, (2.0,)).tpot_s is None


def test_every_line_of_the_table_has_its_number() -> None:
    found = summarise(RUN, (Comparison(0, Verdict.EQUAL),), prices=PRICES)
    assert {line.key for lines in SECTIONS.values() for line in lines} <= set(found)


def test_the_picture_shows_fleet_rate_and_marks() -> None:
    console = Console(file=StringIO(), width=140)
    console.print(picture(RUN, columns=50))
    fleet, tokens, marks, axis = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    row = marks[17:67]
    assert [(column, mark) for column, mark in enumerate(row) if mark != " "] == [(10, "x"), (26, "X")]
    assert fleet.startswith("fleet, max 2 ") and (fleet[17], fleet[17 + 12], fleet[17 + 16]) == ("█", "▄", "█")
    assert tokens[17:67].count(" ") > 30 and axis[17] == "0" and axis.rstrip().endswith("100 s")


def test_a_narrow_console_gets_a_narrow_picture() -> None:
    console = Console(file=StringIO(), width=80)
    print_report(console, {"run": (RUN, summarise(RUN, prices=PRICES))})
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in lines) and sum("100 s" in line for line in lines) == 1
    assert len([line for line in lines if line.startswith("│")]) == 4, "no line is folded"


def test_two_runs_stand_side_by_side() -> None:
    summary = summarise(RUN, (Comparison(0, Verdict.ALTERED, 0, 1.0, 4),), prices=PRICES)
    console = Console(file=StringIO(), width=140)
    print_report(console, {"steady": (RUN, summarise(RUN, prices=PRICES)), "with preemptions": (RUN, summary)})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    header = next(line for line in text.splitlines() if "steady" in line and "with preemptions" in line)
    altered = next(line for line in text.splitlines() if "tokens altered" in line)
    assert header.index("steady") < header.index("with preemptions")
    assert altered.split() == ["tokens", "altered", "–", "4"]


def test_a_timeline_is_described_before_it_runs() -> None:
    actions = (
        Arrive(0.0, 0, 1, 1, 0.0, 1),
        GiveNotice(1.0, "a", 2.0),
        Take(2.0, "a", noticed=True),
        Launch(3.0, "c", ""),
        Take(3.5, "b", noticed=False),
        Arrive(4.0, 1, 1, 1, 0.0, 1),
    )
    assert describe(Timeline({"a": "", "b": ""}, actions, 5.0, clamped_rows=3)) == (
        "5 s: 2 instances at the start, 2 losses (1 with notice), 1 launches; "
        "2 requests (0.50 per second, gap CV 0.00), 3 rows without tokens given 1"
    )
    assert describe(Timeline({}, actions[:1], 5.0)) == "5 s: the fleet as it is; 1 requests"


def test_bars() -> None:
    assert bars([0, 1, 4, 8]) == " ▁▄█" and bars([]) == "" and bars([0, 0]) == "  "
    assert bars([1, 10_000]) == "▁█", "what is there is seen"
