"""Formats of others: each comes back as it was written, real files are what their sources say, and broken ones are told where."""

import json
import os
import re
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.core.errors import ConfigError, TraceError
from spotserve.replay.describe import describe_capacity, describe_requests, dispersion
from spotserve.replay.formats import parse_capacity, parse_requests, parse_trace, read_trace_text
from spotserve.replay.rows import Options
from spotserve.replay.trace import CapacityEvent, CapacityTrace, RequestTrace, TraceRequest, merge_capacity
from spotserve.replay.trace_writers import CAPACITY_WRITERS, REQUEST_WRITERS, counts_of, write_trace

DATA = Path(os.environ.get("SPOTSERVE_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "traces").is_dir(), reason="SPOTSERVE_DATA names no folder with public traces")


@st.composite
def fleets(draw: st.DrawFn) -> CapacityTrace:
    """Histories at whole minutes, which every format can tell; nobody comes and goes at once."""
    present: list[str] = []
    events: list[CapacityEvent] = []
    for number, minute in enumerate(sorted(draw(st.sets(st.integers(0, 500), min_size=1, max_size=20)))):
        goes = min(draw(st.integers(0, 3)), len(present)) if number else 0
        if goes:
            events += [CapacityEvent(minute * 60.0, "remove", present.pop()) for _ in range(goes)]
        else:
            for _ in range(draw(st.integers(1, 4))):
                present.append(f"n{len(events)}")
                events.append(CapacityEvent(minute * 60.0, "add", present[-1]))
    start_s = events[0].time_s
    return CapacityTrace(tuple(CapacityEvent(e.time_s - start_s, e.change, e.instance) for e in events), "drawn")


@st.composite
def loads(draw: st.DrawFn) -> RequestTrace:
    """Requests at whole milliseconds, from time 0 on."""
    times = [0, *sorted(draw(st.lists(st.integers(0, 10_000_000), max_size=20)))]
    tokens = st.integers(1, 100_000)
    prefixes = st.lists(st.integers(0, 1000), max_size=5).map(tuple)
    return RequestTrace(
        tuple(TraceRequest(at / 1000, draw(tokens), draw(tokens), prefix=draw(prefixes)) for at in times),
        "drawn",
        prefix_block_tokens=512,
    )


@given(fleets(), st.sampled_from(sorted(CAPACITY_WRITERS)))
def test_every_capacity_format_comes_back(trace: CapacityTrace, name: str) -> None:
    back = parse_capacity(write_trace(trace, name), "f")
    assert back.format == name
    if name in ("spotserve-capacity", "bamboo", "spotserve-lines"):
        assert back.events == trace.events
    steps = [next(group) for _, group in groupby(counts_of(back), key=lambda point: point[1])]
    assert steps == [next(group) for _, group in groupby(counts_of(trace), key=lambda point: point[1])]
    assert write_trace(back, name) == write_trace(parse_capacity(write_trace(back, name), "f"), name)


@given(loads(), st.sampled_from(sorted(REQUEST_WRITERS)))
def test_every_request_format_comes_back(trace: RequestTrace, name: str) -> None:
    output = trace.requests[0].output_tokens
    back = parse_requests(write_trace(trace, name), "f", Options(output_tokens=output))
    assert back.format == name
    for written, read in zip(trace.requests, back.requests, strict=True):
        assert read.arrival_s == pytest.approx(written.arrival_s, abs=2e-6)
        assert read.prompt_tokens == written.prompt_tokens
        assert read.output_tokens == (output if name == "spotserve-queries" else written.output_tokens)
        assert read.prefix == (written.prefix if name in ("mooncake", "spotserve-requests") else ())


@settings(max_examples=300)
@given(st.data())
def test_whatever_is_broken_is_told_with_its_place(data: st.DataObject) -> None:
    trace = data.draw(st.one_of(fleets(), loads()))
    writers = CAPACITY_WRITERS if isinstance(trace, CapacityTrace) else REQUEST_WRITERS
    text = write_trace(trace, data.draw(st.sampled_from(sorted(writers))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        match data.draw(st.sampled_from(["cut", "drop", "put", "swap", "line"])):
            case "cut":
                text = text[:at]
            case "drop":
                text = text[:at] + text[at + data.draw(st.integers(1, 8)) :]
            case "put":
                text = text[:at] + data.draw(st.text(max_size=6)) + text[at:]
            case "swap":
                lines = text.split("\n")
                data.draw(st.randoms()).shuffle(lines)
                text = "\n".join(lines)
            case "line":
                text = text[:at] + "\n" + text[at:]
    try:
        parse_trace(text, "broken.csv")
    except TraceError as error:
        told = str(error)
        assert re.match(r"broken\.csv:\d+: expected ", told) or (told.startswith("broken.csv: expected ") and "no rows" in told)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ('[0, "add", {"nodes": ["a"]}]\n[5, "leave", {}]\n', 2, '"remove"'),
        ('[0, "add", {"nodes": ["a"]}]\n[5, "add", {"nodes": ["a"]}]\n', 2, "absent instance"),
        ('[0, "DONE", {}]\n[5, "add", {"nodes": ["a"]}]\n', 2, "nothing after DONE"),
        ("0,1\n5,x\n", 2, "whole number"),
        ("2021-12-11, 11:11:30, 5\n2021-12-10, 11:11:30, 5\n", 2, "not before"),
        ('{"metadata": {"gap_seconds": 30}, "data": [1, -2]}', 1, "count 1"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n1,2\n", 2, "3 columns"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n{"timestamp": 1}\n', 2, "input_length"),
        ("Timestamp,Request tokens,Response tokens\n5,1,1\n4,1,1\n", 3, "not before"),
    ],
)
def test_errors_name_file_line_and_expectation(text: str, line: int, expected: str) -> None:
    with pytest.raises(TraceError, match=rf"^f:{line}: expected .*{re.escape(expected)}"):
        parse_trace(text, "f")


def test_burstgpt_is_read_by_name() -> None:
    plain = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,10,0,10,API log\n7,GPT-4,3,4,7,API log\n"
    wide = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,a,1,GPT-4,10,0,10,x\n"
    trace = parse_requests(plain, "f")
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace.requests] == [(0.0, 10, 1), (2.0, 3, 4)]
    assert trace.clamped_rows == 1
    assert parse_requests(wide, "f").requests[0].prompt_tokens == 10


def test_an_offset_in_azures_stamps_counts() -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 02:00:01.009930+02:00,1,2\n"
    assert [request.arrival_s for request in parse_requests(text, "f").requests] == [0.0, 1.0]


def test_rows_that_go_back_in_time_override_and_invent_no_losses() -> None:
    text = "2021-12-11, 11:00:00, 5\n2021-12-11, 11:02:00, 1\n2021-12-11, 11:01:00, 5\n2021-12-11, 11:03:00, 5\n"
    trace = parse_capacity(text, "f")
    assert counts_of(trace) == [(0.0, 5)] and trace.dropped_rows == 1


def test_the_unit_of_counts_is_found_and_told() -> None:
    for text, end_s, unit in (
        ("0,1\n600,2\n", 600.0, "seconds"),
        ("0.0,1\n2.5,2\n", 9000.0, "hours"),
        ("0,1\n36000000,2\n", 36000.0, "ms"),
    ):
        trace = parse_capacity(text, "f")
        assert trace.end_s == end_s and any(unit[:1] in told for told in trace.assumed)


def test_victims_depend_on_the_seed_alone() -> None:
    text = "0,9\n60,3\n120,9\n"
    first, again, other = (parse_capacity(text, "f", Options(seed=seed)).events for seed in (1, 1, 2))
    assert first == again != other


def test_a_tick_can_be_said() -> None:
    text = json.dumps({"metadata": {"gap_seconds": 600}, "data": [1, 2]})
    assert parse_capacity(text, "f", Options(tick_s=30.0)).end_s == 60.0


def test_parcae_and_spotserve_lines() -> None:
    trace = parse_capacity(
        '# x\n[0, "add", {"nodes": ["a", "b"]}]\n[60000, "no-op", {"nodes": []}]\n[90000, "remove", {"nodes": ["b"]}]\n', "f"
    )
    assert trace.format == "parcae-lines" and len(trace.events) == 3
    trace = parse_capacity(
        '[0, "add", {"nodes": ["a"]}]\n[5000, "other", {"nodes": [], "required_tpt": 0.8}]\n[9000, "DONE", {}]\n', "f"
    )
    assert trace.required_rps == ((5.0, 0.8),) and trace.end_s == 9.0 and trace.is_ended


def test_histories_of_zones_become_one() -> None:
    one = CapacityTrace((CapacityEvent(0.0, "add", "a"), CapacityEvent(9.0, "remove", "a")), "x")
    other = CapacityTrace((CapacityEvent(3.0, "add", "a"), CapacityEvent(3.0, "add", "b", "z")), "y")
    events = merge_capacity({"east": one, "west": other}).events
    assert [(e.time_s, e.instance, e.zone) for e in events] == [
        (0.0, "east/a", "east"),
        (3.0, "west/a", "west"),
        (3.0, "b", "z"),
        (9.0, "east/a", "east"),
    ]


def test_an_unknown_format_lists_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="bamboo"):
        write_trace(CapacityTrace((), "x"), "csv")


def test_dispersion_by_hand() -> None:
    assert dispersion([0, 0.5, 1.5, 2.1, 2.2, 2.3, 4.5], 1.0) == pytest.approx(1.25 / 1.5)
    assert dispersion([], 1.0) is None


@needs_data
def test_real_fleets_are_what_their_sources_say() -> None:
    spot = DATA / "traces" / "spot"
    facts = describe_capacity(parse_capacity(read_trace_text(spot / "bamboo" / "g4dn-trace.csv"), "g4dn"))
    assert (facts["loss_moments"], facts["losses"], facts["gains"], facts["largest_loss"]) == (48, 74, 79, 5)
    assert facts["life_median_s"] / 60 == pytest.approx(61, abs=1) and facts["life_short_share"] == pytest.approx(0.095, abs=0.001)
    gcp = describe_capacity(parse_capacity(read_trace_text(spot / "bamboo" / "gcloud" / "a100x1-east1b.txt"), "gcp"))
    assert (gcp["loss_moments"], gcp["losses"], gcp["largest_loss"]) == (36, 154, 36)
    for path in [*spot.glob("bamboo/doc-data/*.csv"), *spot.glob("spotserve/trace_seg/*.txt")]:
        assert parse_capacity(read_trace_text(path), str(path)).events


@needs_data
def test_real_loads_are_what_their_sources_say() -> None:
    requests = DATA / "traces" / "requests"
    azure = describe_requests(
        parse_requests(read_trace_text(requests / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv"), "azure")
    )
    assert azure["requests"] == 19_366 and azure["gap_cv"] == pytest.approx(1.09, abs=0.005) and azure["dispersion_60_s"] > 10
    mooncake = parse_requests(read_trace_text(requests / "mooncake" / "synthetic_trace.jsonl"), "mooncake")
    assert len(mooncake.requests) == 3993 and describe_requests(mooncake)["prefix_seen_share"] > 0.1
    for path in requests.glob("spotserve-queries/query*.txt"):
        assert parse_requests(read_trace_text(path), str(path)).format == "spotserve-queries"
