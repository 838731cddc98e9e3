"""Policies beside each other: how latencies are spread, their tails, what they cost, and what is left of them at other loads.

The forms of the tails and of the costs are those of Figures 6 and 7 of the SpotServe paper (ASPLOS'24). Pure.
"""

from collections.abc import Callable, Sequence

from spotserve.replay import svg
from spotserve.replay.case import Case
from spotserve.replay.sketch import PAPER_PERCENTS
from spotserve.replay.svg import Scale

HALF, WHOLE = 548.0, 1120.0
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 300.0, 62.0, 16.0, 16.0, 44.0
_LOG_FROM = 30.0
"""Bars that differ by more than this factor stand on a logarithmic scale."""
_NAMES = 140.0
"""Room for names at the ends of lines."""
_MOST_FACTORS = 42
"""Bars that get their factor written above."""


def legend(cases: Sequence[Case]) -> str:
    """Colour, dashes and mark of each case, as boxes that show and hide it."""
    items = []
    for number, case in enumerate(cases):
        css = svg.series(number)
        sample = svg.line(2, 8, 32, 8, f"line {css}", svg.dashes(number)) + svg.marker(17, 8, number, f"mark {css}", size=4)
        box = f'<input type="checkbox" checked="checked" data-case="{number}"/>'
        items.append(f'<label>{box}<svg class="sample" width="34" height="16" aria-hidden="true">{sample}</svg>{case.name}</label>')
    return f'<div class="legend">{"".join(items)}</div>'


def distribution(cases: Sequence[Case], *, of: str, title: str, name: str) -> str:
    """Share of attempts that took at most so long, so that lost ones are missing on top; `of`: ttft or e2e."""
    quantiles = [case.sketch.ttft_s if of == "ttft" else case.sketch.e2e_s for case in cases]
    positive = [value for each in quantiles for value in each if value > 0]
    x = svg.logarithmic(min(positive, default=0.01), max(positive, default=1.0), _LEFT, HALF - _RIGHT)
    y = Scale(0.0, 100.0, _HEIGHT - _BOTTOM, _TOP)
    parts = _frame(x, y, HALF, across="seconds", up="% of attempts")
    for number, (case, values) in enumerate(zip(cases, quantiles, strict=True)):
        last = max(1, len(values) - 1)
        top = 100 * (case.sketch.begun_share if of == "ttft" else case.sketch.answered_share)
        points = [(x(max(value, x.low)), y(top * place / last)) for place, value in enumerate(values)]
        line = svg.polyline(points, f"line {svg.series(number)}", svg.dashes(number)) if points else ""
        parts.append(_of_case(number, line))
    told = "; ".join(f"{case.name}: median {_text(case, f'{of}_p50_s')} s, p99 {_text(case, f'{of}_p99_s')} s" for case in cases)
    return svg.picture(HALF, _HEIGHT, title, told, parts, name=name)


def tails(cases: Sequence[Case], *, title: str, name: str) -> str:
    """Mean and tail of the time to the last token, a bar for each case; the factor over the first case is above its bar."""
    groups = ["AVG", *(f"P{percent:g}" for percent in PAPER_PERCENTS)]
    rows = [(case.sketch.e2e_mean_s, *case.sketch.e2e_percentiles_s) for case in cases]
    values = [value for row in rows for value in row if value is not None and value > 0]
    high, low = max(values, default=1.0), min(values, default=1.0)
    is_log = high / low > _LOG_FROM
    bottom, top = _HEIGHT - _BOTTOM, _TOP + 14
    y = svg.logarithmic(low / 1.5, high, bottom, top) if is_log else svg.linear(high, bottom, top)
    parts = _rows(y, WHOLE, "seconds" + (", logarithmic" if is_log else ""))
    room = (WHOLE - _LEFT - _RIGHT) / len(groups)
    width = min(46.0, room * 0.82 / max(1, len(cases)))
    is_told = len(cases) * len(groups) <= _MOST_FACTORS and len(cases) > 1
    for place, group in enumerate(groups):
        middle = _LEFT + room * (place + 0.5)
        parts.append(svg.text(middle, bottom + 18, group, "tick", "middle"))
        for number, (case, row) in enumerate(zip(cases, rows, strict=True)):
            value, first = row[place], rows[0][place]
            if value is None:
                continue
            left = middle + (number - len(cases) / 2) * width
            factor = value / first if first else None
            told = f"{case.name}, {group}: {svg.number_text(value)} s" + (f", {factor:.2f} x" if factor and number else "")
            bar = svg.rect(left + 1, y(value), width - 2, bottom - y(value), f"bar {svg.series(number)}", told)
            label = ""
            if is_told and factor and number:
                label = svg.text(left + width / 2, y(value) - 4, f"{factor:.1f}x", "factor", "middle")
            parts.append(_of_case(number, bar + label))
    told = "; ".join(f"{case.name}: P99 {svg.number_text(row[-1])} s" for case, row in zip(cases, rows, strict=True) if row[-1])
    return svg.picture(WHOLE, _HEIGHT, title, told, parts, name=name)


def cost_against_latency(cases: Sequence[Case], *, key: str, title: str, name: str) -> str:
    """A mark for each case: dollars per million output tokens across, a latency up; nearer to the corner is better."""
    dollars = "usd_per_million_output_tokens"
    points = [(case, case.summary.get(dollars), case.summary.get(key)) for case in cases]
    known = [(usd, seconds) for _, usd, seconds in points if usd is not None and seconds is not None]
    x = svg.linear(max((usd for usd, _ in known), default=1.0) * 1.12, _LEFT, HALF - _RIGHT)
    seconds_up = [seconds for _, seconds in known if seconds > 0]
    is_log = bool(seconds_up) and max(seconds_up) / min(seconds_up) > _LOG_FROM
    bottom = _HEIGHT - _BOTTOM
    y = (
        svg.logarithmic(min(seconds_up), max(seconds_up) * 1.1, bottom, _TOP)
        if is_log
        else svg.linear(max(seconds_up, default=1.0) * 1.12, bottom, _TOP)
    )
    parts = _frame(x, y, HALF, across="USD per million output tokens", up="seconds" + (", logarithmic" if is_log else ""))
    taken: list[tuple[float, float]] = []
    for number, (case, usd, seconds) in enumerate(points):
        if usd is None or seconds is None:
            continue
        at = (x(usd), y(seconds))
        told = f"{case.name}: {svg.number_text(usd)} USD, {svg.number_text(seconds)} s"
        spread = _spread(case, dollars, key, x, y, at, svg.series(number))
        mark = svg.marker(*at, number, f"mark {svg.series(number)}", told, 6)
        parts.append(_of_case(number, spread + mark + _label(at, case.name, taken)))
    told = "; ".join(f"{case.name}: {svg.number_text(usd)} USD, {svg.number_text(s)} s" for case, usd, s in points if usd and s)
    return svg.picture(HALF, _HEIGHT, title, told, parts, name=name)


def goodput_against_rate(cases: Sequence[Case], *, title: str, name: str) -> str:
    """Share of all attempts that meet the objectives, over how much faster than in the trace they come: a line for each policy."""
    x = svg.linear(max((case.rate_scale for case in cases), default=1.0), _LEFT, WHOLE - _NAMES)
    y = Scale(0.0, 100.0, _HEIGHT - _BOTTOM, _TOP)
    parts = _frame(x, y, WHOLE - _NAMES + _RIGHT, across="times the trace's rate", up="% of attempts that are good")
    taken: list[tuple[float, float]] = []
    for number, policy in enumerate(dict.fromkeys(case.policy for case in cases)):
        own = sorted((case for case in cases if case.policy == policy), key=lambda case: case.rate_scale)
        at = [(x(case.rate_scale), y(_good_percent(case)), case) for case in own]
        line = svg.polyline([(across, up) for across, up, _ in at], f"line {svg.series(number)}", svg.dashes(number))
        marks = "".join(
            _margin(case, y, across, svg.series(number))
            + svg.marker(across, up, number, f"mark {svg.series(number)}", f"{case.name}: {_good_percent(case):.1f} % are good")
            for across, up, case in at
        )
        parts.append(_of_case(number, line + marks + _label(at[-1][:2], policy, taken)))
    told = "; ".join(f"{case.name}: {_good_percent(case):.1f} %" for case in cases)
    return svg.picture(WHOLE, _HEIGHT, title, told, parts, name=name)


def _good_percent(case: Case) -> float:
    return 100 * float(case.summary["goodput_share"] or 0)


def _margin(case: Case, y: Scale, across: float, css: str) -> str:
    """The interval of a goodput."""
    each = case.intervals.get("goodput_share")
    return "" if each is None else svg.line(across, y(100 * each.low), across, y(100 * each.high), f"spread {css}")


def _of_case(number: int, content: str) -> str:
    """What the boxes of the legend show and hide."""
    return f'<g data-case="{number}">{content}</g>'


def _text(case: Case, key: str) -> str:
    value = case.summary.get(key)
    return "unknown" if value is None else svg.number_text(value)


def _frame(x: Scale, y: Scale, width: float, *, across: str, up: str) -> list[str]:
    parts = _rows(y, width, up)
    for value in x.ticks(8):
        parts += [svg.line(x(value), _TOP, x(value), _HEIGHT - _BOTTOM, "grid")]
        parts += [svg.text(x(value), _HEIGHT - _BOTTOM + 18, svg.number_text(value), "tick", "middle")]
    return [*parts, svg.text((x.from_px + x.to_px) / 2, _HEIGHT - 8, across, "axis", "middle")]


def _rows(y: Scale, width: float, up: str) -> list[str]:
    parts = []
    for value in y.ticks():
        parts += [svg.line(_LEFT, y(value), width - _RIGHT, y(value), "grid")]
        parts += [svg.text(_LEFT - 7, y(value) + 4, svg.number_text(value), "tick", "end")]
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    return [*parts, svg.text(13, middle, up, "axis", "middle", f' transform="rotate(-90 13 {svg.px(middle)})"')]


def _spread(
    case: Case, across: str, up: str, x: Scale, y: Scale, at: tuple[float, float], css: str
) -> str:  # fmt: skip
    """Intervals as lines through a mark."""
    parts = []
    if across in case.intervals:
        each = case.intervals[across]
        parts.append(svg.line(x(each.low), at[1], x(each.high), at[1], f"spread {css}"))
    if up in case.intervals:
        each = case.intervals[up]
        parts.append(svg.line(at[0], y(each.low), at[0], y(each.high), f"spread {css}"))
    return "".join(parts)


def _label(at: tuple[float, float], name: str, taken: list[tuple[float, float]]) -> str:
    """A name beside a mark, moved up or down until it covers no other."""
    is_free: Callable[[float], bool] = lambda up: all(abs(up - y) > 12 or abs(at[0] - x) > 110 for x, y in taken)  # noqa: E731
    up = next((up for up in (at[1] + shift for shift in (-7, 12, -20, 25, -33, 38)) if is_free(up)), at[1] - 7)
    taken.append((at[0], up))
    fits = at[0] + 10 + len(name) * 7.2 < HALF - 4 or at[0] > HALF
    return svg.text(at[0] + (10 if fits else -10), up, name, "label", "start" if fits else "end")
