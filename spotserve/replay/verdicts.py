"""Assertions on a summary, for scripts and CI: `e2e_p99_s<60`, `spotserve:goodput_share>=0.99`.

    [POLICY:]METRIC OP NUMBER        OP: < <= > >= == ; METRIC: a key of summary.json, with its percentile first or second

Pure.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from spotserve.core.errors import ConfigError
from spotserve.replay.summary import Summary

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FORM = re.compile(
    rf"\s*(?:(?P<policy>[\w.@-]+)\s*:)?\s*(?P<metric>[A-Za-z][\w.]*)\s*(?P<op><=|>=|==|<|>)\s*(?P<bound>{_NUMBER})\s*"
)
_FIRST = re.compile(r"(p\d+|mean|max)_(.+?)_(s|share|usd)")
_NEAR = 5


@dataclass(frozen=True, slots=True)
class Claim:
    """What is asserted of a number."""

    text: str
    """As it was written."""
    policy: str | None
    """None: of every policy."""
    metric: str
    comparison: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether a value is as asserted."""
        return _OPERATORS[self.comparison](value, self.bound)


def read_claim(text: str) -> Claim:
    """A claim from its text.

    Raises:
        ConfigError: it is not of the form above.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"--assert {text!r}: expected [POLICY:]METRIC OP NUMBER, such as e2e_p99_s<60; OP is < <= > >= ==")
    return Claim(text.strip(), match["policy"], match["metric"], match["op"], float(match["bound"]))


def metric_named(name: str, known: Sequence[str]) -> str:
    """The key that a name means: the name itself, or with its percentile moved (`p99_e2e_s` is `e2e_p99_s`, p99.9 is p999).

    Raises:
        ConfigError: no key is meant; the message lists those that are near.
    """
    plain = name.replace(".", "")
    match = _FIRST.fullmatch(plain)
    for candidate in (plain, f"{match[2]}_{match[1]}_{match[3]}" if match else plain):
        if candidate in known:
            return candidate
    near = get_close_matches(plain, known, n=_NEAR, cutoff=0.5)
    parts = set(plain.split("_"))
    near += sorted((key for key in known if key not in near), key=lambda key: -len(parts & set(key.split("_"))))
    raise ConfigError(f"{name}: there is no such number; near it are {', '.join(near[:_NEAR])}")


def check_claims(claims: Sequence[Claim], metrics: Sequence[str], names: Sequence[str]) -> None:
    """Before a long replay: that every claim is about a number that there will be, of a policy that is played.

    Raises:
        ConfigError: one is not.
    """
    for claim in claims:
        if claim.policy is not None and claim.policy not in names:
            raise ConfigError(f"--assert {claim.text!r}: there is no {claim.policy}; there are {', '.join(names)}")
        try:
            metric_named(claim.metric, metrics)
        except ConfigError as error:
            raise ConfigError(f"--assert {claim.text!r}: {error}") from error


def failures(claims: Sequence[Claim], summaries: Mapping[str, Summary], policy_of: Mapping[str, str]) -> list[str]:
    """A line for each claim that a case of a study does not keep; `policy_of`: by case. What `check_claims` let pass."""
    lines: list[str] = []
    for claim in claims:
        for case in [case for case in summaries if claim.policy in (None, case, policy_of[case])]:
            key = metric_named(claim.metric, list(summaries[case]))
            value = summaries[case][key]
            if value is None or not claim.holds(value):
                said = "has no value" if value is None else f"is {value:.6g}"
                lines.append(f"{case}: {key} {said}, asserted {claim.comparison} {claim.bound:g}")
    return lines
