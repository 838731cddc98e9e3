"""Prompts of the demonstration."""

from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.replay.prompts import CHARACTERS_PER_TOKEN, OPENINGS, build_prompt


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(0, 2**32))
def test_a_prompt_has_about_its_length_and_depends_on_the_seed_alone(prompt_tokens: int, seed: int) -> None:
    prompt = build_prompt(prompt_tokens, seed)
    assert prompt and prompt == build_prompt(prompt_tokens, seed)
    assert len(prompt) <= max(3, round(prompt_tokens * CHARACTERS_PER_TOKEN))
    assert len(prompt) > prompt_tokens * CHARACTERS_PER_TOKEN - 30


def test_openings_are_many_and_different() -> None:
    assert len(OPENINGS) == len(set(OPENINGS)) >= 24
    assert all(opening.strip() and opening.endswith("\n") for opening in OPENINGS)
    assert len({build_prompt(100, seed)[:40] for seed in range(200)}) > 20
