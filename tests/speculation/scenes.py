"""Machines and drafters that speculators are judged on, and what the best fixed length makes of them."""

import random
from collections.abc import Callable, Sequence

from played import PlayedClock, PlayedDrafter, PlayedEngine, PlayedStep

from spotserve.speculation.adaptive import AdaptiveSpeculator
from spotserve.speculation.cost import PassCost, StepCost

GPU = StepCost(7.1e-3, 0.0, 21e-6, 39.3e-9)
"""A model of 8 B parameters on an H100, as published."""
CPU = StepCost(1.1e-3, 70e-6, 130e-6, 2e-7, row_multiple=4, kv_reread=0.3)
"""The model that ships, on one core."""
HOST_S = 5e-6
"""A draft without a model."""
PROMPT_TOKENS = 100
ANSWER_TOKENS = 256
CONTEXT = PROMPT_TOKENS + ANSWER_TOKENS // 2
LONGEST = 8
HOST, SMALL, LARGE = 0.0, 0.05, 0.3
"""Prices of a draft: without a model, and passes of draft models as shares of a step."""


class Level:
    """An acceptance that the test changes."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, sequence_id: str) -> float:
        return self.value


def drafting(cost: StepCost, price: float) -> PassCost:
    """Of a draft model whose passes take this share of a step; 0: a drafter without a model."""
    if not price:
        return PassCost(0.0, 0.0, HOST_S)
    return PassCost(0.0, price * cost.at(sequences=1, rows=1, kv_tokens=CONTEXT), price * cost.per_row_s)


def fixed_goodput(cost: StepCost, load: int, acceptance: float, price: float, length: int) -> float:
    """Expected tokens per second in the long run, if every sequence drafts so many tokens at every step."""
    tokens = load * sum(acceptance**depth for depth in range(length + 1))
    seconds = cost.at(sequences=load, rows=load * (1 + length), kv_tokens=load * CONTEXT * (1 + cost.kv_reread * length))
    if length and not price:
        seconds += HOST_S * load
    elif length:
        # Rows beside those drafted: the last of a draft that was right as a whole, and the prompt of each new sequence.
        rows = load * (length + acceptance**length) + tokens * PROMPT_TOKENS / ANSWER_TOKENS
        seconds += drafting(cost, price).at(passes=length, rows=rows)
    return tokens / seconds


def best_fixed_goodput(cost: StepCost, load: int, acceptance: float, price: float) -> float:
    """Of all lengths, none included."""
    return max(fixed_goodput(cost, load, acceptance, price, length) for length in range(LONGEST + 1))


class Scene:
    """An adaptive speculator at work on a played machine."""

    def __init__(
        self,
        cost: StepCost,
        load: int,
        acceptance: Callable[[str], float],
        price: float,
        *,
        seed: int = 1,
        pass_cost: PassCost | None = None,
    ) -> None:
        """So many sequences, of which each is somewhere in its answer. With a `price` the drafter is a model."""
        self.clock = PlayedClock()
        chosen = drafting(cost, price) if pass_cost is None else pass_cost
        self.drafter = PlayedDrafter(self.clock, chosen, acceptance, chance=random.Random(seed))
        self.speculator = AdaptiveSpeculator(
            () if price else (self.drafter,),
            self.drafter if price else None,
            law=cost,
            clock=self.clock,
        )
        self.engine = PlayedEngine(self.speculator, cost, self.clock, answer_tokens=ANSWER_TOKENS)
        self.resize(load)

    def resize(self, load: int) -> None:
        """So many sequences from now on."""
        while len(self.engine.sequences) > load:
            self.engine.end_last()
        first = len(self.engine.sequences)
        for index in range(first, load):
            said = ANSWER_TOKENS * (index - first) // (load - first)
            self.engine.start(f"{self.engine.ended}-{index}", PROMPT_TOKENS, said=said)

    def steps(self, count: int) -> list[PlayedStep]:
        """Goes on."""
        return [self.engine.step() for _ in range(count)]


def expected_goodput(steps: Sequence[PlayedStep], acceptance: float) -> float:
    """Tokens per second, but for luck."""
    return sum(step.expected_tokens(acceptance) for step in steps) / sum(step.step_s for step in steps)
