"""The rule finds the best draft length of a machine whose laws are known."""

import pytest

from spotserve.speculation.goodput import GoodputRule


def run(rule: GoodputRule, *, sequences: int, fixed_s: float, per_row_s: float, accepts: int, steps: int = 400) -> list[int]:
    """A machine with these costs, text in which `accepts` tokens of every draft are right."""
    advice = []
    for _ in range(steps):
        tokens = rule.draft_tokens(num_sequences=sequences)
        advice.append(tokens)
        for _ in range(sequences if tokens else 0):
            rule.observe_draft(drafted=tokens, accepted=min(tokens, accepts))
        rows = sequences * (1 + tokens)
        rule.observe_step(rows=rows, step_s=fixed_s + per_row_s * rows)
    return advice[steps // 2 :]


def test_free_rows_and_good_guesses_are_used_to_the_full() -> None:
    advice = run(GoodputRule(max_tokens=4), sequences=2, fixed_s=1e-2, per_row_s=1e-5, accepts=4)
    assert sum(tokens < 4 for tokens in advice) <= len(advice) // 50, "no more than the probes"


def test_no_drafts_where_rows_are_what_costs() -> None:
    advice = run(GoodputRule(max_tokens=4), sequences=32, fixed_s=1e-4, per_row_s=1e-3, accepts=1)
    assert sum(tokens > 0 for tokens in advice) <= len(advice) // 50, "no more than the probes"
    assert any(advice), "it never looks again"


def test_a_hopeless_drafter_is_left_alone() -> None:
    rule = GoodputRule(max_tokens=4)
    advice = run(rule, sequences=4, fixed_s=1e-3, per_row_s=1e-4, accepts=0)
    assert sum(tokens > 0 for tokens in advice) <= len(advice) // 50
    assert rule.acceptance < 0.1


def test_it_follows_a_change_of_text() -> None:
    rule = GoodputRule(max_tokens=4)
    run(rule, sequences=4, fixed_s=1e-3, per_row_s=2e-5, accepts=0)
    assert run(rule, sequences=4, fixed_s=1e-3, per_row_s=2e-5, accepts=4, steps=2000)[-1] == 4


@pytest.mark.parametrize("sequences", [1, 32])
def test_first_advice_is_to_try(sequences: int) -> None:
    assert GoodputRule(max_tokens=3).draft_tokens(num_sequences=sequences) == 3
