"""The guard: off when speculation does not deliver, for longer each time; noise does not trigger it."""

import random

from spotserve.speculation.guard import RealisedGoodput

WINDOW = 32


def window(guard: RealisedGoodput, *, tokens: int, step_s: float, sequences: int = 8) -> None:
    """As many speculating steps as are judged together, while it is on."""
    for _ in range(WINDOW):
        guard.observe(tokens=tokens, sequences=sequences, step_s=step_s, plain_step_s=1.0, speculated=True)


def wait(guard: RealisedGoodput) -> int:
    """Plain steps until it is on again."""
    steps = 0
    while guard.is_off:
        guard.observe(tokens=8, sequences=8, step_s=1.0, plain_step_s=1.0, speculated=False)
        steps += 1
    return steps


def test_a_failing_speculation_is_off_for_longer_each_time() -> None:
    guard = RealisedGoodput()
    waited = []
    for _ in range(9):
        window(guard, tokens=8, step_s=2.0)
        assert guard.is_off
        waited.append(wait(guard))
    assert waited == [64, 128, 256, 512, 1024, 2048, 4096, 4096, 4096]


def test_it_recovers_as_it_doubled() -> None:
    guard = RealisedGoodput()
    for _ in range(3):
        window(guard, tokens=8, step_s=2.0)
        wait(guard)
    for _ in range(2):
        window(guard, tokens=24, step_s=2.0)
        assert not guard.is_off
    window(guard, tokens=8, step_s=2.0)
    assert wait(guard) == 128
    for _ in range(9):
        window(guard, tokens=24, step_s=2.0)
    window(guard, tokens=8, step_s=2.0)
    assert wait(guard) == 64


def test_it_judges_no_sooner_than_it_has_seen_enough() -> None:
    guard = RealisedGoodput()
    for _ in range(WINDOW - 1):
        guard.observe(tokens=8, sequences=8, step_s=9.0, plain_step_s=1.0, speculated=True)
        assert not guard.is_off
    for _ in range(1000):
        guard.observe(tokens=8, sequences=8, step_s=9.0, plain_step_s=1.0, speculated=False)
        assert not guard.is_off, "plain steps are no evidence"
    guard.observe(tokens=8, sequences=8, step_s=9.0, plain_step_s=1.0, speculated=True)
    assert guard.is_off


def test_speculation_that_pays_a_little_is_not_stopped_by_noise() -> None:
    """3 % above plain decoding, acceptance by chance, a twentieth of noise on times."""
    stops = windows = 0
    for seed in range(20):
        chance = random.Random(seed)
        for sequences in (1, 8, 64):
            guard = RealisedGoodput()
            for _ in range(50):
                windows += 1
                for _ in range(WINDOW):
                    tokens = sequences + sum(chance.random() < 0.5 for _ in range(sequences))
                    step_s = 1.5 / 1.03 * chance.uniform(0.95, 1.05)
                    guard.observe(tokens=tokens, sequences=sequences, step_s=step_s, plain_step_s=1.0, speculated=True)
                stops += guard.is_off
                wait(guard)
    assert stops / windows < 0.03


def test_speculation_that_loses_a_tenth_is_stopped_by_and_by() -> None:
    for sequences in (8, 64):
        for seed in range(20):
            chance, guard = random.Random(seed), RealisedGoodput()
            for _ in range(20 * WINDOW):
                tokens = sequences + sum(chance.random() < 0.5 for _ in range(sequences))
                guard.observe(tokens=tokens, sequences=sequences, step_s=1.5 / 0.9, plain_step_s=1.0, speculated=True)
                if guard.is_off:
                    break
            assert guard.is_off
