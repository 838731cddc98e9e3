"""The adaptive speculator: before every step it chooses, for the whole batch at once, who drafts for whom and how much is verified.

Drafters without a model (n-gram, suffix) come first: their guesses cost microseconds. Whether the draft model is worth its passes
is decided on top of them (`depths`), and of everything that was drafted the auction (`goodput`) takes what pays. All of that rests
on three things learned while serving: what steps cost (`cost`), what confidences are worth (`acceptance`), and whether the outcome
is what was expected (`guard`).

It is never blind. Whatever was drafted is held against what the sequence goes on with, verified or not (`labels`); and where drafts
do not pay, every drafter is tried now and then on an allowance, a share of the time that goes by, so that looking costs a percent
at most (`members`).
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from spotserve.speculation.cost import UNKNOWN, StepCost, StepCostFit
from spotserve.speculation.deadline import worths_before
from spotserve.speculation.depths import Candidates, best_depths
from spotserve.speculation.drafter import Drafter, DraftTask, ModelDrafter
from spotserve.speculation.goodput import Base, best_cut
from spotserve.speculation.guard import RealisedGoodput
from spotserve.speculation.members import Member, ModelMember, Moment, Probe
from spotserve.speculation.speculator import NO_DRAFT, ChosenDraft, SequenceState, StepSeen

_INTEREST_FADES: Final = 0.85
"""What a sequence's interest keeps of itself with each draft."""
_SURE: Final = 0.75
"""Chance of a draft's first token from which no second opinion is asked for."""
_LAG_STEPS: Final = 64
"""A lag is charged to so many steps, or to what is left of the sequence if that is less."""
_MOST_LOOKS: Final = 8
"""Steps in a row that the draft model is tried for."""
_MOST_ALIKE: Final = 96
"""Steps of as many rows each after which one goes without drafts: what a row costs cannot be told from steps that are all alike."""
_NEGLIGIBLE: Final = 0.02
"""Chance of survival below which nothing is verified."""


class AdaptiveSpeculator:
    """See `Speculator`."""

    def __init__(
        self,
        drafters: Sequence[Drafter],
        model: ModelDrafter | None = None,
        *,
        max_depth: int = 8,
        law: StepCost = UNKNOWN,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Starts without knowing anything.

        Args:
            drafters: those that compute nothing, the cheapest first.
            model: one that does.
            max_depth: of any draft.
            law: how rows are padded and context is read again; its seconds are not looked at, they are learned.
            clock: in seconds.
        """
        self._members = [Member(drafter) for drafter in drafters]
        self._model = None if model is None else ModelMember(model)
        self._everybody = [*self._members] if self._model is None else [*self._members, self._model]
        self._max_depth = max_depth
        self._clock = clock
        self._steps = StepCostFit(law)
        self._guard = RealisedGoodput()
        self._step = 0
        self._spent_s = 0.0
        self._advanced_s = 0.0
        """Spent in this step on lags, for steps to come; below, what of that was not charged to any yet."""
        self._owed_s = 0.0
        self._alike = 0
        """Steps in a row that speculated and had as many rows as the one before."""
        self._last_rows = 0
        self._deadline_s: float | None = None

    @property
    def max_depth(self) -> int:
        """See `Speculator.max_depth`."""
        return self._max_depth

    @property
    def step_cost(self) -> StepCost:
        """What steps cost, as far as is known."""
        return self._steps.cost

    @property
    def is_held_back(self) -> bool:
        """Whether nothing is verified for a while, because speculation did not deliver."""
        return self._guard.is_off

    # ------------------------------------------------------------------ before a step

    def propose(
        self, tasks: Sequence[DraftTask], limits: Sequence[int], *, prompt_rows: int, max_nodes: int
    ) -> Sequence[ChosenDraft]:
        """See `Speculator.propose`."""
        self._step += 1
        started_s = self._clock()
        moment = self._moment(tasks, limits, prompt_rows)
        for member in self._members:
            if not member.rests(self._step):
                self._ask(member, moment)
        if self._model is not None and not self._model.rests(self._step):
            self._ask_model(self._model, moment)
        is_plain = self._guard.is_off or max_nodes <= 0 or self._alike >= _MOST_ALIKE
        chosen = None if is_plain else _cut(moment, max_nodes)
        self._spent_s += self._clock() - started_s
        return [NO_DRAFT] * len(tasks) if chosen is None else chosen

    def _moment(self, tasks: Sequence[DraftTask], limits: Sequence[int], prompt_rows: int) -> Moment:
        cost = self._steps.cost
        contexts = [len(task.token_ids) for task in tasks]
        worths = self._worths(tasks, cost, contexts)
        worth = float(len(tasks)) if worths is None else sum(worths)
        base = Base(len(tasks), len(tasks) + prompt_rows, sum(contexts), worth)
        plain_s = cost.at(sequences=base.sequences, rows=base.rows, kv_tokens=base.kv_tokens)
        return Moment(tasks, limits, contexts, worths, cost, base, worth / plain_s, [None] * len(tasks))

    def _worths(self, tasks: Sequence[DraftTask], cost: StepCost, contexts: Sequence[int]) -> list[float] | None:
        if self._deadline_s is None or not self._steps.measurements:
            return None
        step_s = cost.at(sequences=len(tasks), rows=len(tasks), kv_tokens=sum(contexts))
        left_s = self._deadline_s - self._clock()
        return worths_before([task.remaining_tokens for task in tasks], step_s=step_s, left_s=left_s, max_depth=self._max_depth)

    def _ask(self, member: Member, moment: Moment) -> None:
        """Has a member without a model draft for sequences for which that pays, and for some others, to look again."""
        interest, draft_s, first_s = member.interest, member.draft_s, member.first_interest_s
        wanted: list[int] = []
        others: list[int] = []
        for index, task in enumerate(moment.tasks):
            offer = moment.offers[index]
            if moment.limits[index] == 0 or (offer is not None and offer.survivals[0] >= _SURE):
                continue
            (wanted if interest.get(task.sequence_id, first_s) >= draft_s else others).append(index)
        if others:
            wanted += member.looked_at(others, moment.base.worth / moment.goodput)
        if not wanted:
            return
        drafts = member.drafts([moment.tasks[index] for index in wanted], step=self._step, clock=self._clock)
        for index, draft in zip(wanted, drafts or (), strict=drafts is not None):
            earned_s = 0.0
            if draft.tree:
                offer, known = member.offer(moment, index, draft), moment.offers[index]
                earned_s = offer.net_s - (0.0 if known is None else known.net_s)
                if earned_s > 0 or known is None:
                    moment.offers[index] = offer
            sequence_id = moment.tasks[index].sequence_id
            before = interest.get(sequence_id, member.first_interest_s)
            interest[sequence_id] = _INTEREST_FADES * before + (1 - _INTEREST_FADES) * max(0.0, earned_s)

    def _ask_model(self, model: ModelMember, moment: Moment) -> None:
        """Lets the draft model draft where it pays beyond what the others offer; else tries it, if the allowance covers that."""
        lags = [model.model.lag(task) for task in moment.tasks]
        charged = [
            max(0, lag - 1) / min(_LAG_STEPS, max(1, task.remaining_tokens)) for lag, task in zip(lags, moment.tasks, strict=True)
        ]
        depths = self._depths(model, moment, charged) if model.passes.measurements and not self._guard.is_off else ()
        if any(depths):
            model.needs_no_looks(moment.base.worth / moment.goodput)
        else:
            depths = _probe(model, moment, lags)
        wanted = [index for index, depth in enumerate(depths) if depth > 0]
        if not wanted:
            return
        tasks = [moment.tasks[index] for index in wanted]
        go_on = _go_on(model, moment, wanted, [min(depths[index], moment.limits[index]) for index in wanted])
        drafts = model.drafts_while(tasks, go_on, step=self._step, clock=self._clock)
        if drafts is not None:
            ahead = sum(max(0, lags[index] - 1) - charged[index] for index in wanted)
            self._advanced_s = model.passes.cost.per_row_s * min(ahead, model.model.work.rows)
        for index, draft in zip(wanted, drafts or (), strict=drafts is not None):
            if draft.tree:
                offer, known = model.offer(moment, index, draft), moment.offers[index]
                if known is None or offer.net_s > known.net_s:
                    moment.offers[index] = offer

    def _depths(self, model: ModelMember, moment: Moment, charged: Sequence[float]) -> tuple[int, ...]:
        """How deep the model should draft for each sequence."""
        candidates = Candidates(
            survivals=self._expected(model, moment),
            contexts=np.array(moment.contexts, dtype=np.float64),
            lags=np.array(charged),
            other_worths=np.array([0.0 if offer is None else offer.gained for offer in moment.offers]),
            other_nodes=np.array([0.0 if offer is None else float(offer.nodes) for offer in moment.offers]),
        )
        goodput = max(moment.goodput, candidates.goodput_of_others(moment.base, moment.cost))
        return best_depths(candidates, moment.base, moment.cost, model.passes.cost, goodput=goodput).depths

    def _expected(self, model: ModelMember, moment: Moment) -> NDArray[np.float64]:
        """[sequences, depths] chances of survival before anything is drafted, by worth."""
        at_depth = np.array([model.acceptance.at_depth(depth) for depth in range(1, self._max_depth + 1)])
        factors = np.array([model.acceptance.factor(task.sequence_id) for task in moment.tasks])
        survivals = np.cumprod(np.minimum(0.995, factors[:, None] * at_depth), axis=1)
        survivals[np.arange(1, self._max_depth + 1) > np.array(moment.limits)[:, None]] = 0.0
        return survivals if moment.worths is None else survivals * np.array(moment.worths)[:, None]

    # ------------------------------------------------------------------ after a step

    def observe_tokens(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """See `Speculator.observe_tokens`."""
        for member in self._members:
            member.follow(sequence_id, token_ids)
        if (model := self._model) is not None:
            is_right = model.follow(sequence_id, token_ids)
            probe = model.probe
            if sequence_id in probe.awaited:
                probe.awaited.discard(sequence_id)
                if is_right:  # a surprise, as far as it is one, is worth another look
                    model.allowance_s += probe.each_s * (1.0 - model.acceptance.at_depth(1))

    def observe_step(self, seen: StepSeen) -> None:
        """See `Speculator.observe_step`."""
        for member in self._everybody:
            member.acceptance.end_step()
        spent_s, self._spent_s = self._spent_s, 0.0
        advanced_s, self._advanced_s = self._advanced_s, 0.0
        self._owed_s += advanced_s
        if seen.prompt_rows or not seen.sequences:
            return
        self._alike = self._alike + 1 if seen.draft_nodes and seen.rows == self._last_rows else 0
        self._last_rows = seen.rows
        self._steps.add(
            sequences=seen.sequences,
            rows=seen.rows,
            kv_tokens=seen.kv_tokens,
            draft_kv_tokens=seen.draft_kv_tokens,
            seconds=max(seen.step_s - spent_s, 1e-6),
        )
        paid_s = self._owed_s / _LAG_STEPS if seen.draft_nodes else 0.0
        self._owed_s -= paid_s
        self._guard.observe(
            tokens=seen.tokens,
            sequences=seen.sequences,
            step_s=max(1e-6, seen.step_s - advanced_s + paid_s),
            plain_step_s=self._steps.cost.at(sequences=seen.sequences, rows=seen.sequences, kv_tokens=seen.kv_tokens),
            speculated=seen.draft_nodes > 0,
        )

    def finish_before(self, deadline_s: float | None) -> None:
        """See `Speculator.finish_before`."""
        self._deadline_s = deadline_s

    def state(self, sequence_id: str) -> SequenceState:
        """See `Speculator.state`."""
        return {member.name: member.acceptance.state(sequence_id) for member in self._everybody}

    def adopt(self, sequence_id: str, state: SequenceState) -> None:
        """See `Speculator.adopt`."""
        for member in self._everybody:
            known = state.get(member.name)
            if known is not None:
                member.acceptance.adopt(sequence_id, known)

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """See `Speculator.forget`."""
        for member in self._everybody:
            member.forget(sequence_id, token_ids)


def _probe(model: ModelMember, moment: Moment, lags: Sequence[int]) -> tuple[int, ...]:
    """Depths that let the model draft a token for some sequences, if the allowance covers it. The first time, when nobody knows
    what a pass costs, two for one sequence."""
    able = sorted((index for index, limit in enumerate(moment.limits) if limit > 0), key=lambda index: lags[index])
    if not able:
        return ()
    if not model.passes.measurements:
        return tuple(2 if index == able[0] else 0 for index in range(len(lags)))
    cost, probe, tasks = model.passes.cost, model.probe, moment.tasks
    looked_at = [index for index in able if tasks[index].sequence_id in probe.sequence_ids] if probe.looks else []
    if not looked_at:
        # A pass is shared by as many as cost together what it costs alone. Lags are worked off once: that is worth several looks.
        pass_s = cost.at(passes=1, rows=0)
        lag_s = 0.0
        for count, index in enumerate(able, start=1):
            more_s = (lags[index] - 1) * cost.per_row_s
            if looked_at and (count * cost.per_row_s > pass_s or lag_s + more_s > 2 * pass_s):
                break
            looked_at.append(index)
            lag_s += more_s
        look_s = max(1e-9, cost.at(passes=1, rows=len(looked_at)))
        looks = min(_MOST_LOOKS, 1 + round(lag_s / look_s))
        if not model.affords(lag_s + looks * look_s, moment.base.worth / moment.goodput):
            return ()
        probe = model.probe = Probe({tasks[index].sequence_id for index in looked_at}, looks, look_s / len(looked_at))
    model.allowance_s -= cost.at(passes=1, rows=sum(max(1, lags[index]) for index in looked_at))
    probe.looks -= 1
    probe.awaited = {tasks[index].sequence_id for index in looked_at}
    chosen = set(looked_at)
    return tuple(1 if index in chosen else 0 for index in range(len(lags)))


def _go_on(
    model: ModelMember, moment: Moment, wanted: Sequence[int], depths: Sequence[int]
) -> Callable[[int, Sequence[float]], list[int]]:
    """After each pass: sequences for which the next one is worth its rows, as long as together they are worth the pass."""
    acceptance, cost = model.acceptance, model.passes.cost
    factors = [acceptance.factor(moment.tasks[index].sequence_id) for index in wanted]
    survivals = [moment.worth(index) for index in wanted]

    def go_on(depth: int, confidences: Sequence[float]) -> list[int]:
        going, surplus_s = [], 0.0
        next_one = acceptance.at_depth(depth + 1)
        for at, confidence in enumerate(confidences):
            if confidence < 0 or depth >= depths[at]:
                continue
            survivals[at] *= min(1.0, factors[at] * acceptance.of_node(depth, confidence))
            expected = survivals[at] * min(1.0, factors[at] * next_one)
            gain_s = expected / moment.goodput - moment.row_s(wanted[at]) - cost.per_row_s
            if gain_s > 0:
                going.append(at)
                surplus_s += gain_s
        return going if surplus_s > cost.per_pass_s else []

    return go_on


def _cut(moment: Moment, max_nodes: int) -> Sequence[ChosenDraft] | None:
    """Of all offers the nodes that pay; None: none does."""
    owners: list[int] = []
    places: list[int] = []
    line: list[float] = []
    # What does not pay at the plain goodput pays at no better one; but it may fill up padding.
    least = _NEGLIGIBLE if moment.cost.has_padding(moment.base.rows) else max(_NEGLIGIBLE, moment.least)
    for index, offer in enumerate(moment.offers):
        if offer is None:
            continue
        worth = moment.worth(index)
        for place, survival in enumerate(offer.survivals[: moment.limits[index]]):
            if survival >= least:
                owners.append(index)
                places.append(place)
                line.append(survival * worth)
    if not line:
        return None
    contexts = moment.contexts
    cut = best_cut(line, [contexts[owner] for owner in owners], moment.base, moment.cost, max_nodes=max_nodes)
    if not cut.nodes:
        return None
    kept: dict[int, list[int]] = {}
    for node in cut.nodes:
        kept.setdefault(owners[node], []).append(places[node])
    chosen = [NO_DRAFT] * len(moment.offers)
    for index, nodes in kept.items():
        offer = moment.offers[index]
        assert offer is not None
        chosen[index] = ChosenDraft(offer.draft.tree.keep(sorted(nodes)), offer.name)
    return chosen
