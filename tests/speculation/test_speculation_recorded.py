"""The adaptive speculator over what real drafters drafted for real answers, at loads that change.

A changed controller is judged here in seconds, without a model: by tokens per second beside plain decoding and every fixed drafter
and length, at every load.
"""

from functools import cache
from time import process_time

import pytest
from played import PlayedClock, PlayedStep, goodput
from recorded import RecordedDrafter, RecordedEngine, read_recording

from spotserve.bench.recorded_drafts import Recording
from spotserve.speculation.adaptive import AdaptiveSpeculator
from spotserve.speculation.fixed import FixedSpeculator

LOADS = (1, 4, 16, 64)
FIXED = [(name, length) for name in ("ngram", "suffix", "model") for length in (1, 2, 4, 8)]
ARRIVALS = [(1, 2000), (64, 100), (1, 2000), (8, 500), (32, 150), (2, 1000), (64, 100), (4, 1000), (1, 2000), (16, 300), (3, 850)]
"""Sequences at a time, and steps: 10,000."""


@cache
def recording() -> Recording:
    """Read once."""
    return read_recording()


def adaptive(drafters: dict[str, RecordedDrafter], clock: PlayedClock) -> AdaptiveSpeculator:
    """As `engine.speculators` makes it."""
    step = recording().step
    hosts = (drafters["ngram"], drafters["suffix"])
    return AdaptiveSpeculator(hosts, drafters["model"], law=step, clock=clock)


@cache
def arrivals() -> tuple[dict[int, list[PlayedStep]], tuple[int, ...], float]:
    """Steps by load, the drafted nodes of every step, and seconds of this processor."""
    engine = RecordedEngine(recording(), adaptive)
    by_load: dict[int, list[PlayedStep]] = {}
    started_s = process_time()
    for load, count in ARRIVALS:
        by_load.setdefault(load, []).extend(engine.steps(load, count))
    return by_load, tuple(engine.chosen), process_time() - started_s


def test_the_recording_holds_what_it_says() -> None:
    answers = recording().answers
    assert {answer.kind for answer in answers} == {"repeating code", "fresh code", "prose"}
    assert sum(answer.places for answer in answers) > 10_000
    for answer in answers:
        assert answer.guesses.keys() == {"ngram", "suffix", "model"}
        for guesses in answer.guesses.values():
            assert len(guesses.lengths) == len(guesses.accepted) == answer.places
            assert sum(guesses.lengths) == len(guesses.confidences)
            assert all(right <= length <= 8 for right, length in zip(guesses.accepted, guesses.lengths, strict=True))
    assert recording().drafting["model"].per_pass_s > 0 == recording().drafting["ngram"].per_pass_s
    again = Recording.decode(recording().encode())
    assert again == recording()


@pytest.mark.parametrize("load", LOADS)
def test_no_fixed_drafter_and_length_is_better(load: int) -> None:
    """Over all answers, each as often, at one load."""
    times = 1 if load < 16 else 3
    plain = goodput(RecordedEngine(recording(), lambda drafters, clock: None).whole(load, times))
    fixed = {
        (name, length): goodput(
            RecordedEngine(
                recording(),
                lambda drafters, clock, n=name, k=length: FixedSpeculator(drafters[n], max_depth=k),  # type: ignore[misc]
            ).whole(load, times)
        )
        for name, length in FIXED
    }
    found = goodput(RecordedEngine(recording(), adaptive).whole(load, times))
    best = max(fixed, key=fixed.__getitem__)
    print(
        f"load {load}: {found / plain:.3f} x plain, {found / fixed[best]:.3f} x the best fixed, {best} of {fixed[best] / plain:.3f}"
    )
    assert found >= 0.98 * plain
    assert found >= 0.97 * fixed[best], f"{best} is better"


def test_ten_thousand_steps_at_changing_loads() -> None:
    by_load, chosen, seconds = arrivals()
    assert len(chosen) == sum(count for _, count in ARRIVALS) == 10_000
    sequences = sum(step.sequences for steps in by_load.values() for step in steps)
    print(f"10,000 steps of {sequences / 10_000:.1f} sequences: {seconds:.2f} s of this processor")
    for load, steps in by_load.items():
        # What the machine makes of as many sequences with contexts as they were, without drafts.
        context = 96 + 48
        plain = load / recording().step.at(sequences=load, rows=load, kv_tokens=load * context)
        print(f"load {load}: {goodput(steps) / plain:.3f} x plain")
        assert goodput(steps) >= 0.98 * plain


def test_decisions_are_the_same_again() -> None:
    engine = RecordedEngine(recording(), adaptive)
    again = [step for load, count in ARRIVALS[:3] for step in engine.steps(load, count)]
    by_load, chosen, _ = arrivals()
    assert tuple(engine.chosen) == chosen[: len(again)]
    first = by_load[1][:2000]
    assert goodput(again[:2000]) == pytest.approx(goodput(first), rel=1e-12)
