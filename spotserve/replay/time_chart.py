"""One replay over time: plans above machines above latencies above queues, on one axis, with notices and losses. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.replay import svg
from spotserve.replay.page_style import TINTS
from spotserve.replay.sketch import Band, Mark, Sketch
from spotserve.replay.svg import Scale

WIDTH = 1120.0
_LEFT, _RIGHT = 62.0, 12.0
_PLAN, _FLEET, _LATENCY, _QUEUE = (26.0, 48.0), (72.0, 172.0), (200.0, 350.0), (378.0, 468.0)
_HEIGHT = 500.0
_LETTER_PX = 6.1
_MOST_LINES = 400
"""Losses that are drawn as lines; of more, as many at equal distances."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Scales that all pictures of a page share, so that they can be compared."""

    machines: float
    low_s: float
    high_s: float
    requests: float
    length_s: float


def extent(sketches: Sequence[Sketch]) -> Extent:
    """Enough for all of them."""
    bins = [each for sketch in sketches for each in sketch.bins]
    seconds = [value for each in bins for value in (each.p50_s, each.p99_s) if value is not None and value > 0]
    seconds += [dot.seconds for sketch in sketches for dot in sketch.dots if dot.seconds > 0]
    return Extent(
        machines=max((each.spot + each.on_demand for each in bins), default=1.0),
        low_s=min(seconds, default=0.1),
        high_s=max(seconds, default=10.0),
        requests=max((each.in_flight for each in bins), default=1.0),
        length_s=max((sketch.length_s for sketch in sketches), default=1.0),
    )


def time_chart(sketch: Sketch, shared: Extent, *, title: str, name: str) -> str:
    """The picture."""
    x = Scale(0.0, shared.length_s, _LEFT, WIDTH - _RIGHT)
    parts = [
        *_time_axis(x, shared.length_s),
        *_bands(sketch.bands, x),
        *_fleet(sketch, x, svg.linear(shared.machines, _FLEET[1], _FLEET[0])),
        *_latency(sketch, x, svg.logarithmic(shared.low_s, shared.high_s, _LATENCY[1], _LATENCY[0])),
        *_queue(sketch, x, svg.linear(shared.requests, _QUEUE[1], _QUEUE[0], most=4)),
        *_marks(sketch.marks, x),
        svg.line(_LEFT, _PLAN[0], _LEFT, _QUEUE[1], "cross", ' visibility="hidden"'),
    ]
    told = (
        f"Over {svg.time_text(sketch.length_s)}, from top to bottom: the plan, machines rented and replicas serving, time to the "
        f"last token by arrival, requests in flight and without a token. {_losses_text(sketch.marks)}"
    )
    return svg.picture(WIDTH, _HEIGHT, title, told, parts, name=name, extra=f' class="time" data-of="{_data(sketch, x)}"')


def _losses_text(marks: Sequence[Mark]) -> str:
    counts = {kind: sum(mark.count for mark in marks if mark.kind == kind) for kind in ("lost", "taken")}
    return f"{counts['lost']} machines lost with notice, {counts['taken']} without."


def _data(sketch: Sketch, x: Scale) -> str:
    """What the page tells where one points: the place of the axis, and the numbers of each bin."""
    rows = [
        [
            each.from_s,
            round(each.spot + each.on_demand, 1),
            each.p50_s,
            each.p99_s,
            round(each.in_flight, 1),
            round(each.waiting, 1),
        ]
        for each in sketch.bins
    ]
    short = [[None if value is None else float(f"{value:.3g}") for value in row[1:]] for row in rows]
    axis = [x.from_px, x.to_px, round(x.high, 3), round(sketch.width_s, 6)]
    return json.dumps({"axis": axis, "bins": short}, separators=(",", ":")).replace("&", "&amp;").replace('"', "&quot;")


def _time_axis(x: Scale, length_s: float) -> list[str]:
    parts = []
    for at_s in svg.time_ticks_s(length_s):
        parts += [svg.line(x(at_s), _FLEET[0], x(at_s), _QUEUE[1], "grid")]
        anchor = "end" if x(at_s) > WIDTH - 30 else "middle"
        parts += [svg.text(x(at_s), _QUEUE[1] + 18, svg.time_text(at_s), "tick", anchor)]
    return parts


def _panel(y: Scale, title: str, most: int = 5) -> list[str]:
    """Lines of a scale, and what it measures."""
    parts = []
    for value in y.ticks(most):
        parts += [svg.line(_LEFT, y(value), WIDTH - _RIGHT, y(value), "grid")]
        parts += [svg.text(_LEFT - 7, y(value) + 4, svg.number_text(value), "tick", "end")]
    return [*parts, svg.text(_LEFT, y.to_px - 8, title, "panel")]


def _bands(bands: Sequence[Band], x: Scale) -> list[str]:
    """Plans: alike ones have one tint; named where there is room."""
    top, bottom = _PLAN
    parts = [svg.text(_LEFT - 7, bottom - 7, "plan", "tick", "end")]
    shapes = shapes_of(bands)
    for band in bands:
        left, right = x(band.from_s), x(band.until_s)
        told = f"{band.shape} from {svg.time_text(band.from_s)} to {svg.time_text(band.until_s)}"
        parts.append(svg.rect(left, top, right - left, bottom - top, f"band t{shapes.index(band.shape) % TINTS}", told))
        if right - left > len(band.shape) * _LETTER_PX + 6:
            parts.append(svg.text((left + right) / 2, bottom - 7, band.shape, "on-band", "middle"))
    if not bands:
        parts.append(svg.text(_LEFT, bottom - 7, "one shape for all, or not told", "quiet"))
    return parts


def shapes_of(bands: Sequence[Band]) -> list[str]:
    """Plans that differ, in the order in which they came: the place of one is its tint."""
    return list(dict.fromkeys(band.shape for band in bands))


def _fleet(sketch: Sketch, x: Scale, y: Scale) -> list[str]:
    """Machines as areas, spot below; replicas as lines, those that serve solid and those that are planned dashed."""
    starts = [x(each.from_s) for each in sketch.bins]
    until = x(sketch.length_s)
    spot = svg.stairs([(at, y(each.spot)) for at, each in zip(starts, sketch.bins, strict=True)], until)
    both = svg.stairs([(at, y(each.spot + each.on_demand)) for at, each in zip(starts, sketch.bins, strict=True)], until)
    floor = [(starts[0], y(0)), (until, y(0))]
    parts = [*_panel(y, "machines rented; replicas serving and planned"), svg.area(spot, floor, "spot")]
    if any(each.on_demand for each in sketch.bins):
        parts.append(svg.area(both, spot, "on-demand"))
    if sketch.serving:
        serving = svg.stairs([(x(at_s), y(replicas)) for at_s, replicas, _ in sketch.serving], until)
        planned = svg.stairs([(x(at_s), y(planned)) for at_s, _, planned in sketch.serving], until)
        parts += [svg.polyline(planned, "planned"), svg.polyline(serving, "serving")]
    return parts


def _latency(sketch: Sketch, x: Scale, y: Scale) -> list[str]:
    """Requests as dots, lost ones as crosses on the upper edge; or median and 99th percentile of bins."""
    parts = _panel(y, "end to end, s, by arrival" + ("" if sketch.dots else ": median and 99th percentile"))
    if sketch.dots:
        whole = "".join(f"M{svg.px(x(dot.at_s))} {svg.px(y(dot.seconds))}h0" for dot in sketch.dots if dot.is_whole)
        lost = [x(dot.at_s) for dot in sketch.dots if not dot.is_whole]
        parts.append(f'<path d="{whole}" class="dots"/>')
    else:
        middle = sketch.width_s / 2
        for css, values in (
            ("p99", [(each.from_s, each.p99_s) for each in sketch.bins]),
            ("p50", [(each.from_s, each.p50_s) for each in sketch.bins]),
        ):
            parts += [
                svg.polyline(run, css) for run in _runs([(x(at_s + middle), None if v is None else y(v)) for at_s, v in values])
            ]
        lost = [x(each.from_s + middle) for each in sketch.bins if each.lost]
    crosses = "".join(f"M{svg.px(at - 3)} {svg.px(y.to_px)}l6 6m0 -6l-6 6" for at in lost)
    return [*parts, f'<path d="{crosses}" class="lost-request"><title>requests lost</title></path>'] if lost else parts


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Stretches without holes; a point alone is a short dash."""
    found: list[list[tuple[float, float]]] = [[]]
    for across, up in points:
        if up is None:
            found.append([])
        else:
            found[-1].append((across, up))
    return [run if len(run) > 1 else [(run[0][0] - 1, run[0][1]), (run[0][0] + 1, run[0][1])] for run in found if run]


def _queue(sketch: Sketch, x: Scale, y: Scale) -> list[str]:
    starts = [x(each.from_s) for each in sketch.bins]
    until = x(sketch.length_s)
    floor = [(starts[0], y(0)), (until, y(0))]
    parts = _panel(y, "requests in flight; without a token", 4)
    for css, values in (
        ("in-flight", [each.in_flight for each in sketch.bins]),
        ("waiting", [each.waiting for each in sketch.bins]),
    ):
        parts.append(svg.area(svg.stairs(list(zip(starts, map(y, values), strict=True)), until), floor, css))
    return parts


def _marks(marks: Sequence[Mark], x: Scale) -> list[str]:
    """Notices as triangles on top; losses as lines through everything, dashed where there had been a notice."""
    parts = []
    for kind in ("notice", "lost", "taken"):
        chosen = [mark for mark in marks if mark.kind == kind]
        for mark in chosen[:: -(-len(chosen) // _MOST_LINES) or 1]:
            machines = f"{mark.count} machine{'s' * (mark.count > 1)}"
            if kind == "notice":
                told = f"notice for {machines} at {svg.time_text(mark.at_s)}"
                parts.append(svg.marker(x(mark.at_s), 14, 4, "notice", told, 3.6))
            else:
                parts.append(svg.line(x(mark.at_s), _PLAN[0] - 8, x(mark.at_s), _QUEUE[1], kind))
                told = f"{machines} lost {'with' if kind == 'lost' else 'without'} notice at {svg.time_text(mark.at_s)}"
                parts.append(svg.rect(x(mark.at_s) - 2.5, _FLEET[0], 5, _QUEUE[1] - _FLEET[0], "touch", told))
    return parts
