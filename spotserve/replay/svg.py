"""Strokes and scales of pictures in SVG. Colours are classes; the page has their values, for light and for dark. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

SERIES = 8
"""Colours there are; then they come again, in other dashes."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 4", "12 4")


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places on paper."""

    low: float
    high: float
    from_px: float
    to_px: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value is; what is beyond the ends is put on them."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = (log10(value) - log10(self.low)) / ((log10(self.high) - log10(self.low)) or 1.0)
        else:
            share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.from_px + share * (self.to_px - self.from_px)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on it."""
        return _decades(self.low, self.high, most) if self.is_log else _steps(self.low, self.high, most)


def linear(high: float, from_px: float, to_px: float, *, most: int = 5) -> Scale:
    """From 0 to the round number at or above a value."""
    high = high if high > 0 else 1.0
    step = _step(high, most)
    return Scale(0.0, ceil(high / step - 1e-9) * step, from_px, to_px)


def logarithmic(low: float, high: float, from_px: float, to_px: float) -> Scale:
    """Between the numbers 1, 2, 5 times a power of ten around two values."""
    low, high = max(low, 1e-6), max(high, 2e-6)
    return Scale(_around(low, up=False), _around(max(high, low * 2), up=True), from_px, to_px, is_log=True)


def _around(value: float, *, up: bool) -> float:
    power = 10.0 ** floor(log10(value) + 1e-12)
    candidates = [power * factor for factor in (1, 2, 5, 10)]
    return min(c for c in candidates if c >= value * (1 - 1e-9)) if up else max(c for c in candidates if c <= value * (1 + 1e-9))


def _step(span: float, most: int) -> float:
    power = 10.0 ** floor(log10(span / most))
    return next(power * factor for factor in (1, 2, 5, 10, 20) if span <= power * factor * most * (1 + 1e-9))


def _steps(low: float, high: float, most: int) -> list[float]:
    step = _step((high - low) or 1.0, most)
    return [number * step for number in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    powers = range(floor(log10(low)) - 1, ceil(log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(inside) <= most:
            return inside
    return inside[:: ceil(len(inside) / most)]


def time_ticks_s(length_s: float, most: int = 9) -> list[float]:
    """Round times from 0 on: seconds, minutes, hours, days."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800)
    step = next((step for step in steps if length_s / step <= most), 1_209_600)
    return [float(step * number) for number in range(int(length_s / step + 1e-9) + 1)]


def time_text(seconds: float) -> str:
    """A time in the largest units that say it."""
    whole = round(seconds)
    days, hours, minutes, rest = whole // 86_400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0"


def number_text(value: float) -> str:
    """Three digits that count; thousands apart."""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.2e}"


def px(value: float) -> str:
    """A place on paper, to a tenth, without what says nothing."""
    return f"{value:.1f}".removesuffix(".0")


def line(x1: float, y1: float, x2: float, y2: float, css: str, extra: str = "") -> str:
    """A straight line."""
    return f'<line x1="{px(x1)}" y1="{px(y1)}" x2="{px(x2)}" y2="{px(y2)}" class="{css}"{extra}/>'


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "") -> str:
    """A box, with what is said of it when it is pointed at."""
    told = f"><title>{escape(title)}</title></rect>" if title else "/>"
    return f'<rect x="{px(x)}" y="{px(y)}" width="{px(max(0.0, width))}" height="{px(max(0.0, height))}" class="{css}"{told}'


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start", extra: str = "") -> str:
    """Words."""
    return f'<text x="{px(x)}" y="{px(y)}" class="{css}" text-anchor="{anchor}"{extra}>{escape(content)}</text>'


def polyline(points: Sequence[tuple[float, float]], css: str, extra: str = "") -> str:
    """A line through points."""
    return f'<polyline class="{css}" points="{" ".join(f"{px(x)},{px(y)}" for x, y in points)}"{extra}/>'


def area(points: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]], css: str) -> str:
    """What lies between two lines."""
    around = [*points, *reversed(base)]
    return f'<polygon class="{css}" points="{" ".join(f"{px(x)},{px(y)}" for x, y in around)}"/>'


def stairs(steps: Sequence[tuple[float, float]], until: float) -> list[tuple[float, float]]:
    """Points of a line that keeps each value until the next."""
    points: list[tuple[float, float]] = []
    for place, (x, y) in enumerate(steps):
        points += [(x, y), (steps[place + 1][0] if place + 1 < len(steps) else until, y)]
    return points


def marker(x: float, y: float, number: int, css: str, title: str = "", size: float = 5.0) -> str:
    """A mark whose form says the series, too."""
    forms = (
        [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
        [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
        [(0, 1.3), (1.2, -0.9), (-1.2, -0.9)],
        [(-1.4, -0.5), (-0.5, -0.5), (-0.5, -1.4), (0.5, -1.4), (0.5, -0.5), (1.4, -0.5), (1.4, 0.5), (0.5, 0.5), (0.5, 1.4),
         (-0.5, 1.4), (-0.5, 0.5), (-1.4, 0.5)],
    )  # fmt: skip
    told = f"<title>{escape(title)}</title>" if title else ""
    if number % (len(forms) + 1) == 0:
        return f'<circle cx="{px(x)}" cy="{px(y)}" r="{px(size)}" class="{css}">{told}</circle>'
    points = " ".join(f"{px(x + size * dx)},{px(y + size * dy)}" for dx, dy in forms[number % (len(forms) + 1) - 1])
    return f'<polygon points="{points}" class="{css}">{told}</polygon>'


def series(number: int) -> str:
    """The class of a series' colour."""
    return f"s{number % SERIES}"


def dashes(number: int) -> str:
    """What tells the lines of two series apart without colours."""
    dash = DASHES[number % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def picture(
    width: float, height: float, title: str, description: str, content: Sequence[str], *, name: str, extra: str = ""
) -> str:
    """A whole picture; `name` is unique on its page."""
    head = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
    return (
        f'<svg viewBox="0 0 {px(width)} {px(height)}" role="img" aria-labelledby="{name}-t {name}-d"{extra}>'
        f"{head}{''.join(content)}</svg>"
    )
