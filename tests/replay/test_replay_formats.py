"""Trace files: what is read, what is refused and in which words."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.errors import TraceError
from spotserve.replay.formats import parse_capacity, parse_requests, read_trace_text
from spotserve.replay.trace import CapacityEvent, TraceRequest, capacity_csv, requests_csv

NAMES = st.text("abcdefghij-0123456789", min_size=1, max_size=8)
TIMES = st.floats(0, 1e9, allow_nan=False)


@st.composite
def histories(draw: st.DrawFn) -> tuple[CapacityEvent, ...]:
    """Fleets that only do what fleets can do."""
    present: list[str] = []
    events: list[CapacityEvent] = []
    zones = draw(st.dictionaries(NAMES, NAMES))
    for at_s in sorted(draw(st.lists(TIMES, max_size=30))):
        if present and draw(st.booleans()):
            name = present.pop(draw(st.integers(0, len(present) - 1)))
            events.append(CapacityEvent(at_s, "remove", name, zones.get(name, "")))
        else:
            name = draw(NAMES.filter(lambda name: name not in present))
            present.append(name)
            events.append(CapacityEvent(at_s, "add", name, zones.get(name, "")))
    return tuple(events)


REQUESTS = st.lists(
    st.builds(
        TraceRequest,
        TIMES,
        st.integers(1, 2**31),
        st.integers(1, 2**31),
        st.none() | st.floats(0, 5),
        st.none() | st.integers(0, 2**64 - 1),
    )
).map(lambda requests: tuple(sorted(requests, key=lambda request: request.arrival_s)))


@given(histories())
def test_capacity_comes_back_as_it_was_written(events: tuple[CapacityEvent, ...]) -> None:
    assert parse_capacity(capacity_csv(events, ["made by a test"]), "f").events == events


@given(REQUESTS)
def test_requests_come_back_as_they_were_written(requests: tuple[TraceRequest, ...]) -> None:
    trace = parse_requests(requests_csv(requests, ["made by a test", "and a second line"]), "f")
    assert trace.requests == requests and trace.clamped_rows == 0


def test_the_optional_columns_may_be_absent_or_alone() -> None:
    assert parse_capacity("time_s,event,instance\n0,add,a\n", "f").events == (CapacityEvent(0.0, "add", "a"),)
    assert parse_requests("arrival_s,prompt_tokens,output_tokens\n0,1,2\n", "f").requests == (TraceRequest(0.0, 1, 2),)
    seeded = parse_requests("arrival_s,prompt_tokens,output_tokens,seed\n0,1,2,7\n", "f").requests
    assert seeded == (TraceRequest(0.0, 1, 2, None, 7),)


def test_comments_blank_lines_spaces_and_crlf_do_not_matter() -> None:
    text = "# a comment\r\n\r\ntime_s, event, instance\r\n0, add, a\r\n# between\r\n5,remove,a\r\n"
    assert parse_capacity(text, "f").events == (CapacityEvent(0.0, "add", "a"), CapacityEvent(5.0, "remove", "a"))


def test_bamboo_is_known_by_its_first_row_and_starts_at_its_first_event() -> None:
    trace = parse_capacity("480000,add,node1\r\n540500,add,node2\r\n600000,remove,node1\r\n", "f")
    assert trace.format == "bamboo"
    assert [(event.time_s, event.change, event.instance) for event in trace.events] == [
        (0.0, "add", "node1"),
        (60.5, "add", "node2"),
        (120.0, "remove", "node1"),
    ]


def test_azure_stamps_have_seven_decimals_and_may_have_an_offset() -> None:
    old = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    trace = parse_requests(old, "f")
    assert trace.format == "azure"
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace.requests] == [(0.0, 374, 44), (4.314579, 396, 109)]
    new = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 02:00:01.009930+02:00,1,2\n"
    assert [request.arrival_s for request in parse_requests(new, "f").requests] == [0.0, 1.0]


def test_rows_without_tokens_are_clamped_and_counted() -> None:
    trace = parse_requests("arrival_s,prompt_tokens,output_tokens\n0,0,5\n1,5,0\n2,0,0\n3,5,5\n", "f")
    assert trace.clamped_rows == 3
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.requests] == [(1, 5), (5, 1), (1, 1), (5, 5)]


CAPACITY_HEAD = "# c\ntime_s,event,instance\n0,add,a\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("x,add,b", "a number as time_s"),
        ("nan,add,b", "a finite time_s"),
        ("-1,add,b", "not negative"),
        ("1,grow,b", "add or remove in column 2"),
        ("1,add,", "an instance in column 3"),
        ("1,add", "3 columns"),
        ("1,add,b,z", "3 columns"),
        ("1,add,a", "the add of an absent instance"),
        ("1,remove,b", "the remove of a present one"),
    ],
)
def test_a_bad_capacity_row_is_named(row: str, expected: str) -> None:
    with pytest.raises(TraceError, match=expected) as caught:
        parse_capacity(f"{CAPACITY_HEAD}{row}\n", "fleet.csv")
    assert str(caught.value).startswith("fleet.csv:4: expected ") and row in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("0,1", "4 columns"),
        ("0,1.5,2,", "a whole number from 0 to .* as prompt_tokens"),
        ("0,1,-2,", "as output_tokens"),
        ("0,1,99999999999,", "as output_tokens"),
        ("0,1,2,hot", "a number as temperature"),
        ("inf,1,2,", "a finite arrival_s"),
    ],
)
def test_a_bad_request_row_is_named(row: str, expected: str) -> None:
    with pytest.raises(TraceError, match=expected) as caught:
        parse_requests(f"arrival_s,prompt_tokens,output_tokens,temperature\n{row}\n", "load.csv")
    assert str(caught.value).startswith("load.csv:2: ")


def test_time_may_not_go_back() -> None:
    with pytest.raises(TraceError, match=r"f:4: expected a time not before 5 s"):
        parse_capacity("time_s,event,instance\n0,add,a\n5,add,b\n4,add,c\n", "f")
    with pytest.raises(TraceError, match=r"f:3: expected an arrival not before 5 s"):
        parse_requests("arrival_s,prompt_tokens,output_tokens\n5,1,1\n4,1,1\n", "f")
    with pytest.raises(TraceError, match=r"f:2: expected a time not before 10 ms"):
        parse_capacity("10,add,a\n5,add,b\n", "f")


@pytest.mark.parametrize(
    "text", ["", "# only a comment\n", "hello\n", "time_s,event\n", "arrival_s,prompt_tokens,output_tokens,colour\n"]
)
def test_an_unknown_file_is_refused_with_the_formats_that_are_known(text: str) -> None:
    with pytest.raises(TraceError, match="bamboo"):
        parse_capacity(text, "f")
    with pytest.raises(TraceError, match="azure"):
        parse_requests(text, "f")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"absent\.csv: expected a readable UTF-8 file"):
        read_trace_text(tmp_path / "absent.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match=r"bytes\.csv"):
        read_trace_text(tmp_path / "bytes.csv")
