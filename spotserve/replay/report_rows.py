"""Which numbers of a summary people are shown, in which order, and how they are written. Values and formats; no computing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from typing import Literal

from spotserve.replay.case import Case
from spotserve.replay.intervals import Interval
from spotserve.replay.svg import number_text

_DUST = 1e-6
"""Of a number: what differs less between repeats is the arithmetic's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number."""

    title: str
    key: str
    scale: float = 1.0
    """What the summary's value is multiplied by for showing."""
    better: Literal["low", "high", ""] = ""


def _spread(title: str, name: str) -> tuple[Row, ...]:
    shown = ("mean", "p50", "p90", "p95", "p99", "p999", "max")
    return tuple(Row(f"{title} {each.replace('p999', 'p99.9')}", f"{name}_{each}_s", better="low") for each in shown)


HEADLINE: Sequence[Row] = (
    Row("requests lost", "requests_lost", better="low"),
    Row("goodput, %", "goodput_share", 100.0, "high"),
    Row("TTFT p99, s", "ttft_p99_s", better="low"),
    Row("end to end p50, s", "e2e_p50_s", better="low"),
    Row("end to end p99, s", "e2e_p99_s", better="low"),
    Row("… after a loss, p99, s", "after_loss_e2e_p99_s", better="low"),
    Row("recovery, mean, s", "recovery_mean_s", better="low"),
    Row("all planned serving, % of time", "whole_plan_share", 100.0, "high"),
    Row("USD", "cost_usd", better="low"),
    Row("USD per million output tokens", "usd_per_million_output_tokens", better="low"),
    Row("saved against on demand, %", "saved_share", 100.0, "high"),
)
"""What one looks at first."""

SECTIONS: Mapping[str, Sequence[Row]] = {
    "Answers": (
        Row("requests", "requests_total"),
        Row("finished", "requests_finished", better="high"),
        Row("lost", "requests_lost", better="low"),
        Row("interrupted", "requests_interrupted"),
        Row("moved with their KV", "requests_moved"),
        Row("resumed from their tokens", "requests_resumed"),
        Row("restarted", "requests_restarted", better="low"),
        Row("output tokens", "tokens_total"),
        Row("prompt tokens", "prompt_tokens_total"),
        Row("tokens recomputed", "tokens_recomputed", better="low"),
        Row("tokens altered", "tokens_altered", better="low"),
        Row("tie flips", "tie_flips"),
        Row("tokens contradicted", "tokens_contradicted", better="low"),
    ),
    "Time to first token, s": _spread("TTFT", "ttft"),
    "Time per output token, s": _spread("TPOT", "tpot"),
    "Between two tokens, s": (*_spread("ITL", "itl"), *_spread("longest of a request", "longest_gap")[4:]),
    "End to end, s": _spread("end to end", "e2e"),
    "After losses, s": (
        Row("requests in flight then", "after_loss_requests"),
        Row("TTFT p99", "after_loss_ttft_p99_s", better="low"),
        Row("end to end p50", "after_loss_e2e_p50_s", better="low"),
        Row("end to end p99", "after_loss_e2e_p99_s", better="low"),
        Row("longest gap p99", "after_loss_longest_gap_p99_s", better="low"),
        Row("longest gap", "after_loss_longest_gap_max_s", better="low"),
    ),
    "Rate": (
        Row("requests that come, per second", "offered_requests_per_s"),
        Row("requests finished, per second", "requests_per_s", better="high"),
        Row("output tokens per second", "tokens_per_s", better="high"),
        Row("good requests per second", "goodput_requests_per_s", better="high"),
        Row("goodput, % of all attempts", "goodput_share", 100.0, "high"),
    ),
    "Fleet": (
        Row("machines lost with notice", "losses_with_notice"),
        Row("machines lost without", "losses_without_notice"),
        Row("moments of loss", "loss_moments"),
        Row("recovery mean, s", "recovery_mean_s", better="low"),
        Row("recovery p50, s", "recovery_p50_s", better="low"),
        Row("recovery max, s", "recovery_max_s", better="low"),
        Row("losses never recovered from", "recoveries_unfinished", better="low"),
        Row("any replica serving, % of time", "available_share", 100.0, "high"),
        Row("all planned serving, % of time", "whole_plan_share", 100.0, "high"),
        Row("weights moved, GB", "weights_moved_bytes", 1e-9),
        Row("weights read, GB", "weights_read_bytes", 1e-9),
        Row("KV moved, GB", "kv_moved_bytes", 1e-9),
    ),
    "Cost": (
        Row("spot machine-hours", "instance_hours_spot"),
        Row("on-demand machine-hours", "instance_hours_on_demand"),
        Row("spot, USD", "spot_usd"),
        Row("on demand, USD", "on_demand_usd"),
        Row("together, USD", "cost_usd", better="low"),
        Row("all hours on demand, USD", "all_on_demand_usd"),
        Row("saved against that, %", "saved_share", 100.0, "high"),
        Row("USD per million output tokens", "usd_per_million_output_tokens", better="low"),
        Row("USD per million tokens, prompts included", "usd_per_million_tokens", better="low"),
    ),
}
"""All, by section."""


def known_rows(rows: Sequence[Row], cases: Sequence[Case]) -> list[Row]:
    """Those of which some case has a value."""
    return [row for row in rows if any(case.summary.get(row.key) is not None for case in cases)]


def cell(row: Row, case: Case) -> str:
    """A number as it is written, with its interval where there is one."""
    value = case.summary.get(row.key)
    if value is None:
        return "–"
    shown = value * row.scale
    text = f"{shown:,.0f}" if row.scale == 1 and float(shown).is_integer() else number_text(shown)
    return text + _margin(case.intervals.get(row.key), row.scale)


def _margin(each: Interval | None, scale: float) -> str:
    if each is None or isinf(each.high) or each.half_width <= _DUST * abs(each.mean):
        return ""
    return f" ± {number_text(each.half_width * scale)}"


def best(row: Row, cases: Sequence[Case]) -> set[str]:
    """Names of the cases that are best in a row among those of their load; nobody where all are alike or nothing is better."""
    found: set[str] = set()
    for rate_scale in {case.rate_scale for case in cases} if row.better else ():
        own = (case for case in cases if case.rate_scale == rate_scale)
        values = {case.name: value for case in own if (value := case.summary.get(row.key)) is not None}
        if len(set(values.values())) > 1:
            top = (min if row.better == "low" else max)(values.values())
            found |= {name for name, value in values.items() if value == top}
    return found
