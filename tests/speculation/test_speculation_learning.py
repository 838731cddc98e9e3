"""The adaptive speculator when acceptance or load change: it follows, and it comes back from where drafts did not pay."""

from collections.abc import Callable
from typing import Any

import pytest
from played import PlayedClock, PlayedDrafter, PlayedEngine, PlayedStep, goodput
from scenes import CPU, GPU, HOST, LARGE, SMALL, Level, Scene, best_fixed_goodput, expected_goodput, fixed_goodput

from spotserve.speculation.adaptive import AdaptiveSpeculator
from spotserve.speculation.cost import PassCost, StepCost
from spotserve.speculation.smartspec_2024 import SmartSpec2024


def learning_shares(cost: StepCost, load: int, price: float, seeds: int) -> list[float]:
    """Acceptance 0.8, 0.2, 0.8: of the best fixed length, what steps 50 to 100 after each change reach."""
    steps: list[list[PlayedStep]] = [[], [], []]
    levels = (0.8, 0.2, 0.8)
    for seed in range(seeds):
        level = Level(0.8)
        scene = Scene(cost, load, level, price, seed=seed)
        scene.steps(100)
        for place, value in enumerate(levels):
            level.value = value
            scene.steps(50)
            steps[place] += scene.steps(50)
    return [
        expected_goodput(of_level, value) / best_fixed_goodput(cost, load, value, price)
        for of_level, value in zip(steps, levels, strict=True)
    ]


@pytest.mark.parametrize(("load", "seeds"), [(1, 8), (8, 4), (64, 1)])
@pytest.mark.parametrize("cost", [GPU, CPU], ids=["gpu", "cpu"])
def test_a_drafter_without_a_model_is_learned_anew_within_fifty_steps(cost: StepCost, load: int, seeds: int) -> None:
    before, worse, better = learning_shares(cost, load, HOST, seeds)
    assert min(before, worse, better) >= 0.95, f"{before:.3f} {worse:.3f} {better:.3f}"


@pytest.mark.parametrize(("cost", "load", "seeds"), [(GPU, 1, 8), (GPU, 8, 3), (GPU, 64, 1), (CPU, 1, 8), (CPU, 64, 1)])
def test_a_small_model_is_learned_anew_within_fifty_steps(cost: StepCost, load: int, seeds: int) -> None:
    _, worse, better = learning_shares(cost, load, SMALL, seeds)
    assert min(worse, better) >= 0.95, f"{worse:.3f} {better:.3f}"


@pytest.mark.parametrize(
    ("cost", "load", "price", "patience"),
    [(GPU, 1, LARGE, 1200), (GPU, 8, LARGE, 600), (GPU, 64, LARGE, 400), (GPU, 8, SMALL, 200), (CPU, 1, LARGE, 4000)],
)
def test_a_model_that_was_hopeless_comes_back_by_itself(cost: StepCost, load: int, price: float, patience: int) -> None:
    """On the last of these machines to read a prompt takes the model three steps: no look would be affordable, if not saved for."""
    level = Level(0.02)
    scene = Scene(cost, load, level, price)
    scene.steps(150)
    off = scene.steps(50)
    assert sum(step.draft_nodes for step in off) < 0.1 * load * len(off)
    level.value = 0.9
    scene.steps(patience)
    back = expected_goodput(scene.steps(50), 0.9)
    assert back >= 0.9 * best_fixed_goodput(cost, load, 0.9, price)
    assert back >= 1.15 * fixed_goodput(cost, load, 0.9, price, 0)


@pytest.mark.parametrize("price", [HOST, SMALL])
@pytest.mark.parametrize("cost", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_load_may_change_at_once(cost: StepCost, price: float) -> None:
    scene = Scene(cost, 1, lambda _: 0.7, price)
    scene.steps(150)
    for load in (64, 1):
        scene.resize(load)
        scene.steps(50)
        share = expected_goodput(scene.steps(50), 0.7) / best_fixed_goodput(cost, load, 0.7, price)
        assert share >= 0.93, f"{share:.3f} at load {load}"


def test_smartspec_as_released_stays_off_for_good_where_the_adaptive_one_comes_back() -> None:
    def play(make: Callable[[PlayedDrafter, PlayedClock], Any]) -> tuple[float, float, int]:
        """Goodput on easy text, on easy text after hard text, and nodes drafted then."""
        clock, level = PlayedClock(), Level(0.85)
        drafter = PlayedDrafter(clock, PassCost(0.0, 0.3e-3, 5e-6), level)
        engine = PlayedEngine(make(drafter, clock), GPU, clock)
        for index in range(64):
            engine.start(f"s{index}", said=4 * index)
        engine_steps = [engine.step() for _ in range(100)]
        level.value = 0.02
        for _ in range(200):
            engine.step()
        level.value = 0.85
        for _ in range(150):
            engine.step()
        again = [engine.step() for _ in range(50)]
        return goodput(engine_steps[50:]), goodput(again), sum(step.draft_nodes for step in again)

    first, after, nodes = play(lambda drafter, clock: SmartSpec2024(drafter, uses_model=True, clock=clock))
    assert nodes == 0
    assert after < 0.7 * first
    first, after, nodes = play(lambda drafter, clock: AdaptiveSpeculator((), drafter, clock=clock))
    assert nodes > 0
    assert after >= 0.93 * first
