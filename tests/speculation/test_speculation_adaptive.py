"""The adaptive speculator beside its pace: drafters that fail, looks that cost little, deadlines, and what it leaves behind."""

from collections.abc import Sequence
from typing import Any

import pytest
from played import PlayedClock, PlayedDrafter, PlayedEngine, goodput
from scenes import CPU, GPU, HOST, LARGE, SMALL, Level, Scene, best_fixed_goodput, drafting, expected_goodput, fixed_goodput

from spotserve.core.request import SamplingParams
from spotserve.speculation.adaptive import AdaptiveSpeculator
from spotserve.speculation.cost import PassCost, StepCost
from spotserve.speculation.drafter import Draft, DraftTask, GoOn
from spotserve.speculation.fixed import FixedSpeculator


def test_a_models_work_on_prompts_is_an_investment_and_no_failure() -> None:
    """It takes ten steps' time at first, and again for every new sequence."""
    scene = Scene(CPU, 64, lambda _: 0.95, LARGE)
    for _ in range(150):
        scene.steps(1)
        assert not scene.speculator.is_held_back
    (step,) = scene.steps(1)
    assert step.draft_nodes > 64


def test_a_row_is_priced_rightly_even_if_all_steps_would_be_alike() -> None:
    """One stream whose drafts are always as long: with now and then a plain step between them it is seen what their rows cost."""
    scene = Scene(CPU, 1, lambda _: 0.95, HOST)
    steps = scene.steps(500)
    assert sum(step.draft_nodes == 0 for step in steps[100:]) <= 6
    assert scene.speculator.step_cost.per_row_s == pytest.approx(CPU.per_row_s, rel=0.5)
    assert expected_goodput(steps[200:], 0.95) >= 0.97 * best_fixed_goodput(CPU, 1, 0.95, HOST)


@pytest.mark.parametrize("price", [HOST, SMALL])
def test_a_drafter_that_fails_costs_its_drafts_only_and_is_tried_again(price: float) -> None:
    scene = Scene(GPU, 4, lambda _: 0.9, price)
    scene.steps(100)
    scene.drafter.fails = True
    calls = scene.drafter.calls
    failing = scene.steps(200)
    assert sum(step.draft_nodes for step in failing) == 0
    assert 3 <= scene.drafter.calls - calls <= 5, "16, 32, 64, 128 steps of rest"
    assert goodput(failing) >= 0.97 * fixed_goodput(GPU, 4, 0.9, price, 0)
    scene.drafter.fails = False
    scene.steps(128)
    assert expected_goodput(scene.steps(50), 0.9) >= 0.93 * best_fixed_goodput(GPU, 4, 0.9, price)


class OneTooFew(PlayedDrafter):
    """Loses the last draft of a batch."""

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        return super().propose(tasks)[:-1]


def test_a_drafter_that_loses_a_draft_has_failed() -> None:
    """Whose draft is whose cannot be known: none is used, and the step goes on."""
    clock = PlayedClock()
    for speculator in (
        AdaptiveSpeculator((OneTooFew(clock, drafting(GPU, 0.0), lambda _: 0.9),), clock=clock),
        FixedSpeculator(OneTooFew(clock, drafting(GPU, 0.0), lambda _: 0.9), max_depth=3),
    ):
        engine = PlayedEngine(speculator, GPU, clock)
        for index in range(3):
            engine.start(f"s{index}")
        steps = [engine.step() for _ in range(20)]
        assert all((step.tokens, step.draft_nodes) == (3, 0) for step in steps)


def remembered(speculator: AdaptiveSpeculator) -> int:
    """Entries about sequences in everything that it holds."""
    members = speculator._everybody
    return sum(
        len(member.interest)
        + len(member._labellers)
        + len(member.acceptance._sequences)
        + (len(member.probe.sequence_ids | member.probe.awaited) if member is speculator._model else 0)
        for member in members
    )


@pytest.mark.parametrize("acceptance", [0.02, 0.9])
@pytest.mark.parametrize("price", [HOST, LARGE])
def test_forgotten_sequences_leave_nothing_behind(price: float, acceptance: float) -> None:
    scene = Scene(GPU, 8, lambda _: acceptance, price)
    scene.steps(300)
    assert scene.engine.ended >= 8
    assert 0 < remembered(scene.speculator) <= 8 * 5
    for sequence_id in list(scene.engine.sequences):
        assert scene.speculator.state(sequence_id).keys() == {"played"}
        scene.engine.end(sequence_id)
    assert remembered(scene.speculator) == 0
    assert scene.drafter.computed == {}
    scene.speculator.forget("never seen", ())
    assert remembered(scene.speculator) == 0


class Timed(PlayedDrafter):
    """Knows how long it drafted."""

    spent_s = 0.0

    def propose_while(self, tasks: Any, go_on: GoOn) -> list[Draft]:
        started_s = self.clock.now_s
        drafts = super().propose_while(tasks, go_on)
        self.spent_s += self.clock.now_s - started_s
        return drafts


@pytest.mark.parametrize("load", [1, 8, 64])
@pytest.mark.parametrize(
    ("cost", "is_model", "acceptance", "pass_cost"),
    [
        (GPU, True, 0.05, PassCost(0.0, 2.1e-3, 5e-6)),
        (GPU, True, 0.02, PassCost(0.0, 0.4e-3, 1e-6)),
        (GPU, True, 0.9, PassCost(0.0, 42e-3, 1e-4)),
        (GPU, True, 0.6, PassCost(0.0, 6.5e-3, 1e-4)),
        (GPU, False, 0.02, PassCost(0.0, 0.0, 3e-4)),
        (CPU, True, 0.05, PassCost(0.0, 0.4e-3, 40e-6)),
        (CPU, True, 0.5, PassCost(0.0, 2e-3, 40e-6)),
        (CPU, False, 0.02, PassCost(0.0, 0.0, 1e-4)),
    ],
)
def test_where_drafts_are_hopeless_looking_costs_little_and_nothing_is_verified(
    cost: StepCost, is_model: bool, acceptance: float, pass_cost: PassCost, load: int
) -> None:
    clock = PlayedClock()
    drafter = Timed(clock, pass_cost, lambda _: acceptance)
    speculator = AdaptiveSpeculator(() if is_model else (drafter,), drafter if is_model else None, law=cost, clock=clock)
    engine = PlayedEngine(speculator, cost, clock)
    for index in range(load):
        engine.start(f"s{index}", said=256 * index // load)
    warm_up, count = (600, 1500) if load == 1 else (200, 500)
    for _ in range(warm_up):
        engine.step()
    before_s = drafter.spent_s
    steps = [engine.step() for _ in range(count)]
    assert (drafter.spent_s - before_s) / sum(step.step_s for step in steps) < 0.015
    assert sum(step.draft_nodes for step in steps) < 0.1 * sum(step.sequences for step in steps)
    assert goodput(steps) >= 0.97 * fixed_goodput(cost, load, acceptance, 0.0, 0)


@pytest.mark.parametrize("price", [HOST, SMALL])
def test_the_same_happens_twice(price: float) -> None:
    def play() -> tuple[list[list[int]], float]:
        level = Level(0.8)
        scene = Scene(CPU, 4, level, price)
        first = scene.steps(60)
        level.value = 0.3
        return [list(step.lengths) for step in first + scene.steps(60)], scene.clock.now_s

    assert play() == play()


def test_what_was_learned_of_a_sequence_goes_with_it() -> None:
    def is_easy(name: str) -> bool:
        return name.partition("/")[0].endswith("-0")

    here = Scene(GPU, 4, lambda name: 0.95 if is_easy(name) else 0.3, HOST)
    here.steps(80)
    easy = next(name for name in here.engine.sequences if is_easy(name))
    hard = next(name for name in here.engine.sequences if not is_easy(name))
    there = AdaptiveSpeculator((here.drafter,), clock=here.clock)
    for name in (easy, hard):
        there.adopt(name, here.speculator.state(name))
    acceptance = there._members[0].acceptance
    assert acceptance.factor(easy) == here.speculator._members[0].acceptance.factor(easy) != 1.0
    assert acceptance.factor(hard) == here.speculator._members[0].acceptance.factor(hard) != acceptance.factor(easy)
    assert there.state(easy) == here.speculator.state(easy)


@pytest.mark.parametrize("is_told", [False, True])
def test_nothing_is_drafted_where_nothing_has_room(is_told: bool) -> None:
    """A limit of 0, or no rows left in the step."""
    scene = Scene(GPU, 3, lambda _: 0.95, HOST)
    scene.steps(50)
    tasks = [
        DraftTask(name, token_ids, max_depth=8, num_prompt_tokens=100, sampling=SamplingParams(max_tokens=10**6))
        for name, token_ids in scene.engine.sequences.items()
    ]
    limits, most = ([0, 2, 5], 1024) if is_told else ([8, 8, 8], 0)
    chosen = scene.speculator.propose(tasks, limits, prompt_rows=0, max_nodes=most)
    assert [len(draft.tree) <= limit for draft, limit in zip(chosen, limits, strict=True)] == [True] * 3
    assert sum(len(draft.tree) for draft in chosen) <= most
    assert any(draft.tree for draft in chosen) == is_told


def ended_in_time(*, told: bool) -> int:
    """64 sequences; a third ends in time anyway, a third may, a third never does."""
    scene = Scene(GPU, 0, lambda _: 0.8, HOST)
    engine, left_s = scene.engine, 1.5
    engine.answer_tokens = 10**6
    plain_steps = int(left_s / GPU.at(sequences=64, rows=64, kv_tokens=64 * 300))
    remaining = {}
    for index in range(64):
        name = f"s{index}"
        remaining[name] = (plain_steps // 2, int(2.6 * plain_steps), 40 * plain_steps)[index % 3]
        engine.start(name, 100, max_tokens=remaining[name])
    deadline_s = scene.clock.now_s + left_s
    if told:
        scene.speculator.finish_before(deadline_s)
    ended = 0
    while scene.clock.now_s < deadline_s:
        engine.step()
        if scene.clock.now_s > deadline_s:
            break
        for name in list(engine.sequences):
            if len(engine.sequences[name]) - 100 >= remaining[name]:
                engine.end(name)
                ended += 1
    return ended


def test_more_sequences_end_before_a_deadline_that_is_known() -> None:
    unaware, aware = ended_in_time(told=False), ended_in_time(told=True)
    assert aware >= unaware + 5, f"{aware} against {unaware} of 64"
