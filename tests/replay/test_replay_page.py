"""The page and its pictures: well-formed, self-contained, the same each time, small, and right where one can compute it."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from played_scene import by_hand, outcome, replays

from spotserve.replay import svg
from spotserve.replay.case import Case
from spotserve.replay.intervals import over_repeats
from spotserve.replay.measures import measure
from spotserve.replay.outcome import Outcomes, Replayed
from spotserve.replay.page import Facts, page
from spotserve.replay.report_rows import HEADLINE, SECTIONS, Row, best, cell
from spotserve.replay.sketch import MOST_DOTS, sketch

FACTS = Facts(title="A <b>", described="d & e", command="spotserve replay", config={"seed": 0}, policies={"a": "what it is"})


def case(replayed: Replayed, name: str = "a", *, rate_scale: float = 1.0, repeats: int = 1, num_bins: int = 60) -> Case:
    summaries = tuple({**measure(replayed), "e2e_p99_s": 5.0 + repeat} for repeat in range(repeats))
    return Case(
        name=name,
        policy=name.partition("@")[0],
        rate_scale=rate_scale,
        summaries=summaries,
        summary=summaries[0],
        intervals=over_repeats(summaries) if repeats > 1 else {},
        sketch=sketch(replayed, num_bins),
    )


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "section":
            self.sections.append(str(named["id"]))
        if tag == "svg" and named.get("role") == "img":
            self.pictures.append(named)
        if "id" in named:
            self.ids.append(str(named["id"]))
        self.loads += [f"{tag} {name}" for name in named if name in ("src", "href", "xlink:href", "srcset")]


def read(text: str) -> _Reader:
    reader = _Reader()
    reader.feed(text)
    return reader


def many(count: int) -> Replayed:
    """As many requests, over a day."""
    outcomes = Outcomes(
        [outcome(n, n * 86_400 / count, n * 86_400 / count + 1, n * 86_400 / count + 3 + n % 9) for n in range(count)]
    )
    return replace(by_hand(), outcomes=outcomes, duration_s=86_400.0, ended_s=86_400.0)


def test_it_is_self_contained_and_has_every_section() -> None:
    text = page([case(by_hand()), case(by_hand(), "b")], FACTS)
    reader = read(text)
    assert reader.sections == ["time", "latency", "tail", "cost", "numbers", "again"]
    assert reader.loads == [] and not re.search(r"https?://|url\(|@import", text)
    assert len(reader.pictures) == 7 and len(set(reader.ids)) == len(reader.ids)
    assert all(set(str(one["aria-labelledby"]).split()) <= set(reader.ids) for one in reader.pictures), "titles for who cannot see"
    assert "A &lt;b&gt;" in text and "d &amp; e" in text and "prefers-color-scheme:dark" in text
    ElementTree.fromstring(re.sub(r"<script>.*?</script>", "", text.removeprefix("<!DOCTYPE html>\n"), flags=re.DOTALL))
    assert text == page([case(by_hand()), case(by_hand(), "b")], FACTS)


def test_a_sweep_has_its_picture_and_the_others_show_the_load_of_the_trace() -> None:
    cases = [case(by_hand(), f"{name}@{scale:g}x", rate_scale=scale) for scale in (0.5, 1.0, 4.0) for name in ("a", "b")]
    text = page(cases, FACTS)
    assert "rate" in read(text).sections and "of 1 times the trace&#x27;s rate" in text
    assert text.count('class="time"') == 2


@given(replays())
def test_whatever_was_played_can_be_drawn(replayed: Replayed) -> None:
    assert read(page([case(replayed)], FACTS)).sections[0] == "time"
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', page([case(replayed)], FACTS).split("<script>")[0].split("</style>")[1])


def test_half_a_million_requests_fit_into_two_megabytes() -> None:
    drawn = sketch(many(20_000), 360)
    assert drawn.dots == () and len(drawn.e2e_s) < 200
    cases = [replace(case(by_hand()), name=f"policy-{n}", sketch=drawn) for n in range(8)]
    assert len(page(cases, FACTS).encode()) < 1_500_000


def test_a_sketch_by_hand() -> None:
    drawn = sketch(by_hand(), 11)
    assert drawn.width_s == 10.0 and len(drawn.dots) == 4 <= MOST_DOTS
    first, second = drawn.bins[0], drawn.bins[1]
    assert (first.p50_s, first.p99_s, first.lost) == (3.0, 9.0, 0) and drawn.bins[8].lost == 1
    assert first.in_flight == pytest.approx((3.0 + 2.0) / 10) and second.in_flight == pytest.approx(0.7)
    assert first.waiting == pytest.approx((1.0 + 0.5) / 10)
    assert (first.spot, first.on_demand, second.spot, second.on_demand) == pytest.approx((2.0, 0.0, 1.0, 1.0))
    assert [(mark.kind, mark.count) for mark in drawn.marks] == [("notice", 1), ("lost", 2), ("taken", 1)]
    assert drawn.bands[0].shape == "2 x (P=1, M=2)" and drawn.bands[0].until_s == 110.0
    assert drawn.answered_share == 0.75 and drawn.begun_share == 0.75 and drawn.e2e_percentiles_s[-1] == 9.0


@given(replays(), st.integers(1, 40))
def test_bins_hold_all_machine_hours_and_all_time_in_flight(replayed: Replayed, num_bins: int) -> None:
    drawn = sketch(replayed, num_bins)
    hours = sum(each.spot + each.on_demand for each in drawn.bins) * drawn.width_s
    inside = sum(max(0.0, min(each.until_s, drawn.length_s) - min(each.from_s, drawn.length_s)) for each in replayed.leases)
    assert hours == pytest.approx(inside, abs=1e-6)
    in_flight = sum(each.in_flight for each in drawn.bins) * drawn.width_s
    assert in_flight == pytest.approx(sum(each.end_s - each.arrival_s for each in replayed.outcomes), abs=1e-6)


def test_cells_and_what_is_best() -> None:
    one, other = case(by_hand(), "a"), replace(case(by_hand(), "b"), summary={**measure(by_hand()), "requests_lost": 0})
    row = Row("lost", "requests_lost", better="low")
    assert cell(row, one) == "1" and best(row, [one, other]) == {"b"} and best(row, [one, one]) == set()
    assert best(row, [one, replace(other, rate_scale=2.0)]) == set(), "another load is another matter"
    assert cell(Row("none", "no_such"), one) == "–"
    repeated = case(by_hand(), repeats=3)
    assert cell(Row("p99", "e2e_p99_s"), repeated) == "5 ± 2.48"
    assert cell(Row("p50", "e2e_p50_s"), repeated) == "5", "what does not differ has no margin"
    known = set(measure(by_hand())) | {"tokens_altered", "tie_flips", "tokens_contradicted"}
    assert {row.key for rows in (HEADLINE, *SECTIONS.values()) for row in rows} <= known


@given(st.floats(1e-4, 1e5), st.floats(1.0, 1e4))
def test_scales_hold_their_values_and_have_marks(low: float, factor: float) -> None:
    for scale in (svg.logarithmic(low, low * factor, 0, 100), svg.linear(low * factor, 0, 100)):
        assert (
            scale.low <= low * factor * (1 + 1e-9) and low * factor <= scale.high * (1 + 1e-9) and 0 <= scale(low * factor) <= 100
        )
        assert 2 <= len(scale.ticks()) <= 7 and all(0 <= scale(tick) <= 100 for tick in scale.ticks())


def test_times_in_words() -> None:
    assert [svg.time_text(s) for s in (0, 59, 60, 3600, 90_061)] == ["0", "59 s", "1 min", "1 h", "1 d 1 h 1 min 1 s"]
    assert svg.time_ticks_s(1200)[:2] == [0.0, 300.0] and len(svg.time_ticks_s(86_400)) == 9
