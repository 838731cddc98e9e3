"""Assertions: their text, the numbers that they mean, and what is said when they do not hold."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.errors import ConfigError
from spotserve.replay.measures import metric_names
from spotserve.replay.verdicts import check_claims, failures, metric_named, read_claim

NAMES = metric_names()
HOLDS = {"<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1), "==": (0,)}
"""By operator: signs of value - bound."""

spaces = st.text(" \t", max_size=2)


@given(
    st.sampled_from([None, "spotserve", "spotserve-2024", "on-demand@2x"]),
    st.sampled_from(NAMES),
    st.sampled_from(sorted(HOLDS)),
    st.floats(-1e9, 1e9),
    st.floats(-1e9, 1e9),
    spaces,
)
def test_what_is_written_is_read(policy: str | None, name: str, op: str, bound: float, value: float, space: str) -> None:
    claim = read_claim(f"{space}{f'{policy}{space}:' if policy else ''}{space}{name}{space}{op}{space}{bound!r}{space}")
    assert (claim.policy, claim.metric, claim.comparison, claim.bound) == (policy, name, op, bound)
    assert claim.holds(value) is ((value > bound) - (value < bound) in HOLDS[op])


@given(st.text(alphabet="ab_p9:<>=!.0-e \n", max_size=24))
def test_any_text_is_a_claim_or_a_mistake_that_is_told(text: str) -> None:
    with contextlib.suppress(ConfigError):
        claim = read_claim(text)
        assert claim.comparison in HOLDS and claim.metric and claim.text == text.strip()


@pytest.mark.parametrize("text", ["", "e2e_p99_s", "<60", "e2e_p99_s<", "e2e_p99_s=<6", "e2e_p99_s<6s", "a:b:c<1", "e2e_p99_s<nan"])
def test_mistakes(text: str) -> None:
    with pytest.raises(ConfigError, match="METRIC OP NUMBER"):
        read_claim(text)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("e2e_p99_s", "e2e_p99_s"),
        ("p99_e2e_s", "e2e_p99_s"),
        ("p99.9_ttft_s", "ttft_p999_s"),
        ("ttft_p99.9_s", "ttft_p999_s"),
        ("mean_recovery_s", "recovery_mean_s"),
        ("p99_after_loss_e2e_s", "after_loss_e2e_p99_s"),
        ("max_itl_s", "itl_max_s"),
    ],
)
def test_percentiles_come_first_or_second(name: str, key: str) -> None:
    assert metric_named(name, NAMES) == key


def test_a_number_that_there_is_not_is_told_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="e2e_p99_s"):
        metric_named("e2e_p98_s", NAMES)
    with pytest.raises(ConfigError, match="goodput_share"):
        metric_named("goodput", NAMES)


def test_claims_are_checked_before_anything_is_played() -> None:
    check_claims([read_claim("a:p99_e2e_s<1")], NAMES, ["a"])
    with pytest.raises(ConfigError, match=r"there is no b; there are a"):
        check_claims([read_claim("b:e2e_p99_s<1")], NAMES, ["a"])
    with pytest.raises(ConfigError, match=r"--assert 'nothing<1'"):
        check_claims([read_claim("nothing<1")], NAMES, ["a"])


def test_failures_say_the_value() -> None:
    summaries = {
        "a@1x": {"e2e_p99_s": 5.0, "x": None},
        "a@2x": {"e2e_p99_s": 70.0, "x": None},
        "b@1x": {"e2e_p99_s": 90.0, "x": 0.0},
    }
    policy_of = {"a@1x": "a", "a@2x": "a", "b@1x": "b"}

    def told(*texts: str) -> list[str]:
        return failures([read_claim(text) for text in texts], summaries, policy_of)

    assert told("a:e2e_p99_s<60") == ["a@2x: e2e_p99_s is 70, asserted < 60"]
    assert told("a@1x:p99_e2e_s<60", "b:x==0") == []
    assert told("e2e_p99_s<60") == ["a@2x: e2e_p99_s is 70, asserted < 60", "b@1x: e2e_p99_s is 90, asserted < 60"]
    assert told("a@1x:x==0") == ["a@1x: x has no value, asserted == 0"]
