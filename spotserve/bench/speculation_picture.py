"""One self-contained page: per kind of text a chart, speed relative to plain decoding over load, a line per policy.

Well-formed as XML, too. Knows results; does not know how they came about.
"""

import math
from html import escape

from spotserve.bench.speculation_policies import ORACLE, PLAIN
from spotserve.bench.speculation_results import Point, Results

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 620, 400, 52, 56, 12, 160
_LABEL_HEIGHT = 16
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:84em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "main{display:flex;flex-wrap:wrap;gap:0 2em}section{flex:0 0 auto}h2{font-size:1.1em;margin:1em 0 .3em}"
    "svg text{font:12px system-ui,sans-serif;fill:#222}pre{overflow-x:auto;font-size:13px}"
)
_FAMILIES = {
    "off": ("#444444",),
    "adaptive": ("#d62728",),
    "oracle": ("#888888",),
    "smartspec-2024": ("#8e44ad",),
    "ngram": ("#9ecae1", "#4292c6", "#084594"),
    "suffix": ("#a1d99b", "#41ab5d", "#005a32"),
    "model": ("#fdbe85", "#f58518", "#a63603"),
    "staged": ("#d9b38c", "#a0713c", "#5c3a12"),
}
"""Shades by drafter: the darker, the longer the draft."""


def page(results: Results) -> str:
    """The page as HTML."""
    title = f"Speculation with {results.model}"
    facts = (
        f"{results.dtype} on {results.device}, {results.threads} thread{'s' * (results.threads > 1)}, "
        f"temperature {results.temperature:g}, {results.rounds} round{'s' * (results.rounds > 1)}, "
        f"draft model: {results.draft_model or 'none'}. Answers that differ from those of plain decoding, as near ties of "
        f"float arithmetic may: {_altered(results)}."
    )
    told = (
        f"Output tokens per second over those of plain decoding (`{PLAIN}`, the line at 1), which are written below the number of "
        "clients at once. Above 1 speculation pays."
    )
    colours = {policy: _colour(results, policy) for policy in results.policies}
    charts = "".join(f"<section><h2>{escape(kind)}</h2>{_chart(results, kind, colours)}</section>" for kind in results.kinds)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<p>{escape(facts)}</p><p>{escape(told)}</p><main>{charts}</main><pre>{escape(results.table())}</pre></body></html>\n"
    )


def _altered(results: Results) -> str:
    counts = [f"{policy} {count}" for policy, count in results.altered.items() if count]
    return ", ".join(counts) or "none"


def _colour(results: Results, policy: str) -> str:
    """By drafter, and within it by length among those measured."""
    family, _, length = policy.partition(":")
    shades = _FAMILIES[family]
    if not length:
        return shades[0]
    lengths = sorted(int(other.partition(":")[2]) for other in results.policies if other.partition(":")[0] == family)
    place = (lengths.index(int(length)) + 0.5) / len(lengths)
    return shades[min(len(shades) - 1, int(place * len(shades)))]


def _chart(results: Results, kind: str, colours: dict[str, str]) -> str:
    lines = {policy: [results.point(kind, load, policy) for load in results.loads] for policy in results.policies}
    values = [point.speedup for line in lines.values() for point in line]
    step = _step(max(values) - min(values))
    low, high = math.floor(min(*values, 1.0) / step) * step, math.ceil(max(*values, 1.0) / step) * step
    first, last = math.log2(results.loads[0]), math.log2(results.loads[-1])
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(load: int) -> float:
        return left + (0.5 if last == first else (math.log2(load) - first) / (last - first)) * (right - left)

    def y(speedup: float) -> float:
        return bottom - (speedup - low) / ((high - low) or 1.0) * (bottom - _TOP)

    parts = [f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(kind)}">']
    for tick in range(round(low / step), round(high / step) + 1):
        at = y(tick * step)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{tick * step:.{2 if step < 0.1 else 1}f} x</text>')
    for load, plain in zip(results.loads, lines[PLAIN], strict=True):
        parts.append(f'<line x1="{x(load):.1f}" x2="{x(load):.1f}" y1="{_TOP}" y2="{bottom}" stroke="#f0f0f0"/>')
        parts.append(f'<text x="{x(load):.1f}" y="{bottom + 18}" text-anchor="middle">{load}</text>')
        parts.append(f'<text x="{x(load):.1f}" y="{bottom + 34}" text-anchor="middle">{plain.output_tokens_per_s:,.0f}/s</text>')
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">clients, plain tokens/s</text>')
    for policy in sorted(results.policies, key=_rank):
        parts += _line(policy, [(x(point.concurrency), y(point.speedup), point) for point in lines[policy]], colours[policy])
    parts += _labels({policy: y(line[-1].speedup) for policy, line in lines.items()}, lines, colours, x(results.loads[-1]))
    return "".join([*parts, "</svg>"])


def _rank(policy: str) -> int:
    """What is drawn last is on top."""
    return {PLAIN: 0, ORACLE: 1, "adaptive": 3}.get(policy, 2)


def _line(policy: str, line: list[tuple[float, float, Point]], colour: str) -> list[str]:
    width = 3.5 if policy == "adaptive" else 1.6
    dashes = ' stroke-dasharray="6 4"' if policy == ORACLE else ""
    points = " ".join(f"{across:.1f},{up:.1f}" for across, up, _ in line)
    parts = [f'<polyline fill="none" stroke="{colour}" stroke-width="{width}"{dashes} points="{points}"/>']
    for across, up, point in line:
        rounds = f", rounds {min(point.paired_speedups):.2f} to {max(point.paired_speedups):.2f}" if point.paired_speedups else ""
        told = f"{policy}, {point.concurrency}: {point.speedup:.2f} x{rounds}; {point.output_tokens_per_s:,.0f} tokens/s"
        parts.append(
            f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{width + 0.6}" fill="{colour}"><title>{escape(told)}</title></circle>'
        )
    return parts


def _labels(ends: dict[str, float], lines: dict[str, list[Point]], colours: dict[str, str], line_end: float) -> list[str]:
    """Names at the ends of the lines, moved apart where they would overlap."""
    parts = []
    for policy, at in _apart(ends).items():
        start, text = max(line_end, _WIDTH - _RIGHT), _WIDTH - _RIGHT + 26
        weight = ' font-weight="bold"' if policy == "adaptive" else ""
        parts.append(
            f'<line x1="{start + 6:.1f}" y1="{ends[policy]:.1f}" x2="{text - 4}" y2="{at:.1f}" stroke="{colours[policy]}"/>'
            f'<text x="{text}" y="{at + 4:.1f}"{weight}>{escape(policy)} {lines[policy][-1].speedup:.2f}</text>'
        )
    return parts


def _apart(ends: dict[str, float]) -> dict[str, float]:
    """Heights near the wanted ones that are no closer than a label is high: groups that touch are spread around their middle."""
    groups: list[list[str]] = []
    for policy in sorted(ends, key=ends.__getitem__):
        groups.append([policy])
        while len(groups) > 1 and _top(groups[-1], ends) < _top(groups[-2], ends) + len(groups[-2]) * _LABEL_HEIGHT:
            last = groups.pop()
            groups[-1] += last
    return {policy: _top(group, ends) + place * _LABEL_HEIGHT for group in groups for place, policy in enumerate(group)}


def _top(group: list[str], ends: dict[str, float]) -> float:
    """Where the first label of a group is."""
    span = (len(group) - 1) * _LABEL_HEIGHT
    middle = sum(ends[policy] for policy in group) / len(group)
    return min(max(_TOP + 4.0, middle - span / 2), _HEIGHT - _BOTTOM - span)


def _step(span: float) -> float:
    """Between two marks of the scale: 1, 2 or 5 times a power of ten, six to twelve of them."""
    power = 10.0 ** math.floor(math.log10(max(span, 0.1) / 6))
    return next(power * factor for factor in (1, 2, 5, 10) if span <= 12 * power * factor) if span > 0 else 0.1
