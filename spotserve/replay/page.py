"""One page for a study: self-contained, with pictures and all numbers; the same bytes for the same cases.

Nothing is loaded from anywhere. It can be read without scripts; they only show numbers where one points, and hide policies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from spotserve.replay import charts, svg
from spotserve.replay.case import Case
from spotserve.replay.page_style import SCRIPT, STYLE, TINTS
from spotserve.replay.report_rows import HEADLINE, SECTIONS, Row, best, cell, known_rows
from spotserve.replay.time_chart import extent, shapes_of, time_chart

OPEN_AT_FIRST = 3
"""Pictures over time that are not folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a page says besides the numbers of its cases."""

    title: str
    described: str
    """The traces, in a line."""
    command: str
    """How to play it again; empty: not told."""
    config: Mapping[str, object]
    policies: Mapping[str, str] = field(default_factory=dict)
    """By policy: what it is, in a line."""


def page(cases: Sequence[Case], facts: Facts) -> str:
    """The page as HTML."""
    shown = _shown(cases)
    sections = [
        _head(shown, facts, is_swept=len(shown) < len(cases)),
        _over_time(shown),
        f"<div>{charts.legend(shown)}{_latencies(shown)}{_tails(shown)}{_costs(shown)}</div>",
        _rates(cases),
        _numbers(cases),
        _again(facts),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"/><meta name="color-scheme" content="light dark"/>'
        f"<title>{escape(facts.title)}</title><style>{STYLE}</style></head><body>"
        f"{''.join(sections)}<script>{SCRIPT}</script></body></html>\n"
    )


def _shown(cases: Sequence[Case]) -> list[Case]:
    """Those at the load nearest to that of the trace: every policy once."""
    scale = min((case.rate_scale for case in cases), key=lambda each: (abs(each - 1), each))
    return [replace(case, name=case.policy) for case in cases if case.rate_scale == scale]


def _head(shown: Sequence[Case], facts: Facts, *, is_swept: bool) -> str:
    policies = "".join(f"<li><b>{escape(name)}</b>: {escape(told)}</li>" for name, told in facts.policies.items())
    repeats = len(shown[0].summaries)
    told = [f"Pictures show the first of {repeats} repeats; numbers are means over them ± half a 95 % interval."] * (repeats > 1)
    if is_swept:
        told.append(f"Pictures, but for the one of goodput, are of {shown[0].rate_scale:g} times the trace's rate.")
    return (
        f'<h1>{escape(facts.title)}</h1><p class="soft">{escape(facts.described)}</p>{_table({"": HEADLINE}, shown)}'
        + (f"<p>{escape(' '.join(told))}</p>" if told else "")
        + (f"<details><summary>What the policies are</summary><ul>{policies}</ul></details>" if policies else "")
    )


def _over_time(shown: Sequence[Case]) -> str:
    shared = extent([case.sketch for case in shown])
    parts = []
    for number, case in enumerate(shown):
        drawn = time_chart(case.sketch, shared, title=f"{case.name} over time", name=f"time-{number}")
        is_open = ' open="open"' if number < OPEN_AT_FIRST else ""
        parts.append(
            f"<details{is_open}><summary>{escape(case.name)}</summary>"
            f'<figure>{drawn}<div class="readout" aria-hidden="true"></div>{_plans(case)}</figure></details>'
        )
    return f"<section id='time'><h2>Over time</h2>{_key()}{''.join(parts)}</section>"


def _plans(case: Case) -> str:
    """Which tint is which plan, where tints can tell them apart."""
    shapes = shapes_of(case.sketch.bands)
    if not 1 < len(shapes) <= TINTS:
        return ""
    boxes = ((svg.rect(1, 1, 24, 10, f"t{number}"), shape) for number, shape in enumerate(shapes))
    items = (f'<span><svg viewBox="0 0 26 12" aria-hidden="true">{box}</svg>{escape(shape)}</span>' for box, shape in boxes)
    return f'<div class="key">{"".join(items)}</div>'


def _key() -> str:
    """What the strokes of the pictures over time mean."""
    box = svg.rect(1, 1, 24, 10, "{}")
    strokes = (
        (box.format("spot"), "spot machines; requests in flight"),
        (box.format("on-demand"), "machines on demand"),
        (svg.line(0, 6, 26, 6, "serving"), "replicas serving"),
        (svg.line(0, 6, 26, 6, "planned"), "replicas planned"),
        (box.format("waiting"), "requests without a token"),
        ('<path d="M13 6h0" class="dots"/>', "a request"),
        (svg.line(0, 6, 26, 6, "p50"), "median"),
        (svg.line(0, 6, 26, 6, "p99"), "99th percentile"),
        (svg.marker(13, 6, 4, "notice", size=4), "notice"),
        (svg.line(13, 0, 13, 12, "lost"), "loss with notice"),
        (svg.line(13, 0, 13, 12, "taken"), "loss without"),
        ('<path d="M10 3l6 6m0 -6l-6 6" class="lost-request"/>', "request lost"),
    )
    items = (f'<span><svg viewBox="0 0 26 12" aria-hidden="true">{drawn}</svg>{told}</span>' for drawn, told in strokes)
    return f'<div class="key">{"".join(items)}</div>'


def _latencies(shown: Sequence[Case]) -> str:
    drawn = "".join(
        f"<figure>{charts.distribution(shown, of=of, title=title, name=f'cdf-{of}')}<figcaption>{title}</figcaption></figure>"
        for of, title in (("ttft", "Time to first token, by policy"), ("e2e", "Time to the last token, by policy"))
    )
    return (
        "<section id='latency'><h2>How latencies are spread</h2>"
        "<p>The share of all attempts that took no longer than so many seconds. Lost ones are missing on top.</p>"
        f'<div class="pair">{drawn}</div></section>'
    )


def _tails(shown: Sequence[Case]) -> str:
    title = "Mean and tail of the time to the last token, by policy"
    versus = f" Above the bars: times the value of {shown[0].name}." if len(shown) > 1 else ""
    return (
        f"<section id='tail'><h2>Mean and tail latency</h2><figure>{charts.tails(shown, title=title, name='tails')}"
        f"<figcaption>{escape(f'End to end, seconds.{versus}')}</figcaption></figure></section>"
    )


def _costs(shown: Sequence[Case]) -> str:
    drawn = "".join(
        f"<figure>{charts.cost_against_latency(shown, key=key, title=title, name=f'cost-{key}')}"
        f"<figcaption>{title}</figcaption></figure>"
        for key, title in (("e2e_mean_s", "Cost against mean latency"), ("e2e_p99_s", "Cost against 99th percentile latency"))
    )
    return (
        "<section id='cost'><h2>Cost against latency</h2><p>End to end; nearer to the lower left corner is better.</p>"
        f'<div class="pair">{drawn}</div></section>'
    )


def _rates(cases: Sequence[Case]) -> str:
    """Nothing where one load was played."""
    if len({case.rate_scale for case in cases}) < 2:
        return ""
    title = "Goodput against rate, by policy"
    drawn = charts.goodput_against_rate(cases, title=title, name="rates")
    told = "Whole answers within every objective, as a share of all attempts."
    return f"<section id='rate'><h2>Goodput against rate</h2><figure>{drawn}<figcaption>{told}</figcaption></figure></section>"


def _numbers(cases: Sequence[Case]) -> str:
    return f"<section id='numbers'><h2>All numbers</h2>{_table(SECTIONS, cases)}</section>"


def _table(sections: Mapping[str, Sequence[Row]], cases: Sequence[Case]) -> str:
    """A column for each case; the best number of a row stands out."""
    names = "".join(f'<th scope="col">{escape(case.name)}</th>' for case in cases)
    body = []
    for title, rows in sections.items():
        known = known_rows(rows, cases)
        if title and known:
            body.append(f'<tr><th scope="rowgroup" colspan="{len(cases) + 1}">{escape(title)}</th></tr>')
        for row in known:
            top = best(row, cases)
            cells = "".join(_cell(escape(cell(row, case)), is_best=case.name in top) for case in cases)
            body.append(f"<tr><td>{escape(row.title)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr><td></td>{names}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _cell(content: str, *, is_best: bool) -> str:
    return f'<td class="best">{content}</td>' if is_best else f"<td>{content}</td>"


def _again(facts: Facts) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in facts.config.items())
    return (
        f"<section id='again'><h2>To play it again</h2>{f'<pre>{escape(facts.command)}</pre>' if facts.command else ''}"
        f'<div class="scroll"><table class="config"><tbody>{rows}</tbody></table></div></section>'
    )
