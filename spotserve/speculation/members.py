"""What the adaptive speculator knows of each of its drafters, and the step that it is about to decide."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

from spotserve.speculation.acceptance import Acceptance, cells_of
from spotserve.speculation.cost import PassCostFit, StepCost
from spotserve.speculation.drafter import Draft, Drafter, DraftTask, GoOn, ModelDrafter, one_for_each
from spotserve.speculation.goodput import Base
from spotserve.speculation.labels import DraftLabeller

_FAILURE_PAUSE_STEPS: Final = 16
"""A drafter that failed is left alone for so long at first, and twice as long each time."""
_MOST_DOUBLINGS: Final = 8
_ALLOWANCE_SHARE: Final = 0.005
"""Of the time that goes by, for each drafter, to be tried where it is not expected to pay."""
_MODEL_ALLOWANCE_SHARE: Final = 0.0075
"""The same for a draft model, of which a look costs more."""
_ALLOWANCE_STEPS: Final = 1.0
"""Steps' worth that an allowance can grow to."""
_FIRST_ALLOWANCE_STEPS: Final = 4.0
"""That a draft model begins with."""
_CALL_FADES: Final = 0.95
"""What the mean time of a draft keeps of itself with each call."""
_FIRST_INTEREST: Final = 6.0
"""Interest that a new sequence begins with at most, in times of a draft."""
_ENDED_FADES: Final = 0.9
"""What the interest of new sequences keeps of itself with each one that ends."""
_LEARNED_WITHOUT_INTEREST: Final = 8
"""One of so many answers is learned from while drafts do not pay."""
_OPTIMISM: Final = 1.25
"""New sequences are expected to be so much more worth while than the last ones."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Moment:
    """A step that is being decided."""

    tasks: Sequence[DraftTask]
    limits: Sequence[int]
    contexts: Sequence[int]
    """Tokens of each sequence."""
    worths: Sequence[float] | None
    """What a token of each sequence is worth; None: 1."""
    cost: StepCost
    base: Base
    goodput: float
    """Worth per second of the step without drafts."""
    offers: "list[Offer | None]"
    """The best draft of each sequence so far."""

    @property
    def least(self) -> float:
        """Chance of survival below which no row pays, if its token is worth 1 at most."""
        return self.cost.per_row_s * self.goodput

    def worth(self, index: int) -> float:
        """Of a token of one sequence."""
        return 1.0 if self.worths is None else self.worths[index]

    def row_s(self, index: int) -> float:
        """What verifying one more token of a sequence takes."""
        return self.cost.per_row_s + self.contexts[index] * self.cost.per_draft_kv_token_s


@dataclass(slots=True)
class Offer:
    """A draft of one sequence."""

    name: str
    draft: Draft
    survivals: list[float]
    """Per node the chance that its path is accepted."""
    net_s: float
    """Seconds that the nodes that pay are worth, less what they take."""
    gained: float
    """Expected tokens of the nodes that pay, by worth."""
    nodes: int
    """That pay."""


class Member:
    """One drafter."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.acceptance = Acceptance()
        self.draft_s = 0.0
        """Mean time of a draft, for drafters without a model."""
        self.interest: dict[str, float] = {}
        """Per sequence the seconds that its last drafts were worth, beyond those of the members before."""
        self.first_interest_s = inf
        """What a new sequence begins with: a little more than the last ones ended with."""
        self.allowance_s = 0.0
        """For drafts that are not expected to pay."""
        self._labellers: dict[str, DraftLabeller] = {}
        self._ended = 0
        self._turn = 0
        self._pause_until = 0
        self._failures = 0

    @property
    def name(self) -> str:
        """Of the drafter."""
        return self.drafter.name

    def rests(self, step: int) -> bool:
        """Whether it is left alone, because it failed."""
        return step < self._pause_until

    def earn_allowance(self, step_s: float) -> None:
        """A step of plain decoding goes by."""
        self.allowance_s = min(_ALLOWANCE_STEPS * step_s, self.allowance_s + _ALLOWANCE_SHARE * step_s)

    def looked_at(self, others: Sequence[int], step_s: float) -> Sequence[int]:
        """Of sequences for which drafts do not pay those that get one nevertheless: as many as the allowance covers, in turn."""
        self.earn_allowance(step_s)
        count = min(len(others), int(self.allowance_s / self.draft_s)) if self.draft_s else 1
        self.allowance_s -= count * self.draft_s
        start = self._turn % len(others)
        self._turn += count
        return [others[(start + place) % len(others)] for place in range(count)]

    def drafts(self, tasks: Sequence[DraftTask], *, step: int, clock: Callable[[], float]) -> Sequence[Draft] | None:
        """A draft for each task; None when it failed: it is dropped for the step, and left alone for some."""
        started_s = clock()
        try:
            drafts = one_for_each(tasks, self.drafter.propose(tasks))
        except Exception:  # noqa: BLE001 -- whatever a drafter raises, it only saves time: the request goes on without it
            self._failed(step)
            return None
        each_s = (clock() - started_s) / len(tasks)
        self.draft_s = _CALL_FADES * self.draft_s + (1 - _CALL_FADES) * each_s if self.draft_s else each_s
        self.first_interest_s = min(self.first_interest_s, _FIRST_INTEREST * self.draft_s)
        return drafts

    def offer(self, moment: Moment, index: int, draft: Draft) -> Offer:
        """What a draft is worth. What the sequence says next will be held against it, unless an earlier draft is still busy."""
        sequence_id, tree = moment.tasks[index].sequence_id, draft.tree
        cells = cells_of(tree.depths(), draft.confidences)
        earlier = self._labellers.get(sequence_id)
        if earlier is None or earlier.is_over or earlier.is_new:
            self._labellers[sequence_id] = DraftLabeller(tree, cells)
        survivals = self.acceptance.survivals(sequence_id, tree.parents, cells)
        worth, row_s = moment.worth(index), moment.row_s(index)
        least = row_s * moment.goodput / worth
        paying = [survival for survival in survivals if survival > least]
        gained = worth * sum(paying)
        return Offer(self.name, draft, survivals, gained / moment.goodput - len(paying) * row_s, gained, len(paying))

    def follow(self, sequence_id: str, token_ids: Sequence[int]) -> bool | None:
        """The next tokens of a sequence. Whether the first of them was drafted; None: nothing was."""
        labeller = self._labellers.get(sequence_id)
        if labeller is None or labeller.is_over:
            return None
        labels = labeller.follow(token_ids)
        self.acceptance.observe(sequence_id, labels)
        return any(label.accepted for label in labels)

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """The sequence is over, here at least."""
        self.acceptance.forget(sequence_id)
        last_s = self.interest.pop(sequence_id, None)
        if last_s is not None:
            known_s = min(self.first_interest_s, _FIRST_INTEREST * self.draft_s)
            self.first_interest_s = _ENDED_FADES * known_s + (1 - _ENDED_FADES) * _OPTIMISM * last_s
        self._labellers.pop(sequence_id, None)
        # To learn from answers costs time as well: where drafts do not pay, some of them show whether that is still so.
        self._ended += 1
        learns = self.first_interest_s >= self.draft_s or self._ended % _LEARNED_WITHOUT_INTEREST == 0
        self.drafter.forget(sequence_id, token_ids if learns else ())

    def _failed(self, step: int) -> None:
        self._pause_until = step + (_FAILURE_PAUSE_STEPS << min(self._failures, _MOST_DOUBLINGS))
        self._failures += 1
        log.exception("drafter %s failed; it is left alone for %d steps", self.name, self._pause_until - step)


@dataclass(slots=True)
class Probe:
    """Some looks at the draft model while it is off."""

    sequence_ids: set[str] = field(default_factory=set)
    """Whom it drafts for."""
    looks: int = 0
    """That are left."""
    each_s: float = 0.0
    """What a look takes for each of them, once there is no lag."""
    awaited: set[str] = field(default_factory=set)
    """Of them those whose last draft nothing was held against yet."""


class ModelMember(Member):
    """The draft model."""

    def __init__(self, model: ModelDrafter) -> None:
        super().__init__(model)
        self.model = model
        self.passes = PassCostFit()
        self.allowance_s = inf
        self.probe = Probe()
        """Under way, or the last one."""

    def affords(self, price_s: float, step_s: float) -> bool:
        """A step goes by in which drafts do not pay; whether the allowance covers a look for such a price."""
        if self.allowance_s == inf:
            self.allowance_s = _FIRST_ALLOWANCE_STEPS * step_s
        most_s = max(_ALLOWANCE_STEPS * step_s, price_s, self.allowance_s)
        self.allowance_s = min(most_s, self.allowance_s + _MODEL_ALLOWANCE_SHARE * step_s)
        return self.allowance_s >= price_s

    def needs_no_looks(self, step_s: float) -> None:
        """It drafts anyway, and what it has for looks does not grow with that."""
        self.allowance_s = min(_ALLOWANCE_STEPS * step_s, self.allowance_s)
        self.probe.looks = 0

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """See `Member.forget`."""
        super().forget(sequence_id, token_ids)
        self.probe.sequence_ids.discard(sequence_id)
        self.probe.awaited.discard(sequence_id)

    def drafts_while(
        self, tasks: Sequence[DraftTask], go_on: GoOn, *, step: int, clock: Callable[[], float]
    ) -> Sequence[Draft] | None:
        """See `Member.drafts` and `ModelDrafter.propose_while`."""
        started_s = clock()
        try:
            drafts = one_for_each(tasks, self.model.propose_while(tasks, go_on))
        except Exception:  # noqa: BLE001 -- whatever a drafter raises, it only saves time: the request goes on without it
            self._failed(step)
            return None
        work = self.model.work
        self.passes.add(passes=work.passes, rows=work.rows, seconds=clock() - started_s)
        return drafts
