"""SmartSpec as it was released: the rule to compare with (Liu et al., "Optimizing Speculative Decoding for Serving Large Language
Models Using Goodput", arXiv 2406.14066; behaviour of the authors' public fork of vLLM, spring 2025).

One acceptance rate for everything, an exponential average that keeps 0.85 and starts at 0.7; one draft length for the whole batch,
decided anew every twenty steps; lengths are tried upwards until goodput falls for the first time; no draft counts 1.1 times. For
prompt lookup the share of sequences that match is averaged alike, starting at 0.5. While the length is 0 nothing is observed, so
the rule never drafts again: that, too, is as released. What it leaves out: profiles made before serving (here step costs are fitted
while serving, by the same fit as the adaptive speculator's) and the guard of the KV cache (the scheduler's room does that).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Final

from spotserve.speculation.cost import UNKNOWN, PassCostFit, StepCost, StepCostFit
from spotserve.speculation.drafter import Drafter, DraftTask, DraftWork
from spotserve.speculation.fixed import OneDrafter, verified_whole
from spotserve.speculation.speculator import NO_DRAFT, ChosenDraft, StepSeen

_DECIDE_EVERY_STEPS: Final = 20
_KEPT: Final = 0.85
_FIRST_ACCEPTANCE: Final = 0.7
_FIRST_MATCHED: Final = 0.5
_PLAIN_HANDICAP: Final = 1.1


class SmartSpec2024(OneDrafter):
    """See `Speculator`."""

    def __init__(
        self,
        drafter: Drafter,
        *,
        max_depth: int = 8,
        law: StepCost = UNKNOWN,
        uses_model: bool = False,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Starts as optimistic as the released one.

        Args:
            drafter: the only one.
            max_depth: lengths that are tried.
            law: how rows are padded and context is read again; its seconds are not looked at, they are learned.
            uses_model: whether every sequence gets a draft, and every token of it takes a pass.
            clock: in seconds.
        """
        super().__init__(drafter, max_depth=max_depth)
        self._uses_model = uses_model
        self._clock = clock
        self._steps = StepCostFit(law)
        self._drafting = PassCostFit()
        self._acceptance = _FIRST_ACCEPTANCE
        self._matched = _FIRST_MATCHED
        self._length = max_depth
        self._until_decision = _DECIDE_EVERY_STEPS
        self._drafted: dict[str, int] = {}
        self._right = self._tried = 0
        self._spent_s = 0.0

    @property
    def length(self) -> int:
        """Of drafts now."""
        return self._length

    def propose(
        self,
        tasks: Sequence[DraftTask],
        limits: Sequence[int],
        *,
        prompt_rows: int,  # noqa: ARG002 -- the protocol's
        max_nodes: int,
    ) -> Sequence[ChosenDraft]:
        """See `Speculator.propose`."""
        if self._until_decision == 0:
            self._length = self._decide([len(task.token_ids) for task in tasks])
            self._until_decision = _DECIDE_EVERY_STEPS
        self._until_decision -= 1
        if self._length == 0:
            return [NO_DRAFT] * len(tasks)
        started_s = self._clock()
        shortened = [replace(task, max_depth=self._length) for task in tasks]
        chosen = verified_whole(self._drafter, shortened, [min(limit, self._length) for limit in limits], max_nodes)
        self._spent_s += self._clock() - started_s
        work = DraftWork(self._length, self._length * len(tasks)) if self._uses_model else DraftWork(0, len(tasks))
        self._drafting.add(passes=work.passes, rows=work.rows, seconds=self._clock() - started_s)
        matched = sum(bool(draft.tree) for draft in chosen) / max(1, len(tasks))
        self._matched = _KEPT * self._matched + (1 - _KEPT) * matched
        # Beside those of other steps under way, whose tokens are not known yet.
        self._drafted.update((task.sequence_id, len(draft.tree)) for task, draft in zip(tasks, chosen, strict=True) if draft.tree)
        return chosen

    def observe_tokens(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """See `Speculator.observe_tokens`."""
        drafted = self._drafted.pop(sequence_id, 0)
        self._right += min(drafted, len(token_ids) - 1)
        self._tried += min(drafted, len(token_ids))

    def observe_step(self, seen: StepSeen) -> None:
        """See `Speculator.observe_step`."""
        if self._tried:
            self._acceptance = _KEPT * self._acceptance + (1 - _KEPT) * self._right / self._tried
        self._right = self._tried = 0
        spent_s, self._spent_s = self._spent_s, 0.0
        if not seen.prompt_rows and seen.sequences:
            target_s = max(seen.step_s - spent_s, 1e-6)
            self._steps.add(
                sequences=seen.sequences,
                rows=seen.rows,
                kv_tokens=seen.kv_tokens,
                draft_kv_tokens=seen.draft_kv_tokens,
                seconds=target_s,
            )

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """See `Speculator.forget`."""
        self._drafted.pop(sequence_id, None)
        super().forget(sequence_id, token_ids)

    def _decide(self, contexts: Sequence[int]) -> int:
        """The first length whose successor has less goodput."""
        best, best_goodput = 0, self._goodput(0, contexts) * _PLAIN_HANDICAP
        for length in range(1, self._max_depth + 1):
            goodput = self._goodput(length, contexts)
            if goodput < best_goodput:
                break
            best, best_goodput = length, goodput
        return best

    def _goodput(self, length: int, contexts: Sequence[int]) -> float:
        """Expected tokens per second of the batch."""
        sequences, context = len(contexts), sum(contexts)
        drafted = 1.0 if self._uses_model else self._matched
        a = min(self._acceptance, 0.999)
        tokens = sequences * (1 - drafted + drafted * (1 - a ** (length + 1)) / (1 - a))
        rows_each = 1 + drafted * length
        cost = self._steps.cost
        read = context * (1 + cost.kv_reread * drafted * length)
        seconds = cost.at(sequences=sequences, rows=sequences * rows_each, kv_tokens=read)
        if length:
            passes = length if self._uses_model else 0
            seconds += self._drafting.cost.at(passes=passes, rows=sequences * max(1, passes))
        return tokens / seconds
