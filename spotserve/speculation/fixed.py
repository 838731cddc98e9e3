"""Always the same: one drafter, so many tokens for every sequence and step."""

import logging
from collections.abc import Sequence

from spotserve.speculation.drafter import Drafter, DraftTask, one_for_each
from spotserve.speculation.speculator import NO_DRAFT, ChosenDraft, SequenceState, StepSeen
from spotserve.speculation.tree import DraftTree

log = logging.getLogger(__name__)


class OneDrafter:
    """What speculators have in common that always ask the same drafter, for all sequences alike."""

    def __init__(self, drafter: Drafter, *, max_depth: int) -> None:
        """`max_depth` tokens are drafted at most, 1 at least."""
        assert max_depth >= 1
        self._drafter = drafter
        self._max_depth = max_depth

    @property
    def max_depth(self) -> int:
        """See `Speculator.max_depth`."""
        return self._max_depth

    def finish_before(self, deadline_s: float | None) -> None:
        """Goes on as ever."""

    def state(self, sequence_id: str) -> SequenceState:  # noqa: ARG002 -- the protocol's
        """Nothing is learned of single sequences."""
        return {}

    def adopt(self, sequence_id: str, state: SequenceState) -> None:
        """Nothing is learned of single sequences."""

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """See `Speculator.forget`."""
        self._drafter.forget(sequence_id, token_ids)


class FixedSpeculator(OneDrafter):
    """See `Speculator`."""

    def propose(
        self,
        tasks: Sequence[DraftTask],
        limits: Sequence[int],
        *,
        prompt_rows: int,  # noqa: ARG002 -- the protocol's
        max_nodes: int,
    ) -> Sequence[ChosenDraft]:
        """See `Speculator.propose`."""
        return verified_whole(self._drafter, tasks, limits, max_nodes)

    def observe_tokens(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """Learns nothing."""

    def observe_step(self, seen: StepSeen) -> None:
        """Learns nothing."""


def verified_whole(drafter: Drafter, tasks: Sequence[DraftTask], limits: Sequence[int], max_nodes: int) -> Sequence[ChosenDraft]:
    """Everything that a drafter drafts, as far as there is room; nothing when it fails, which costs the step its drafts only."""
    able = [index for index, limit in enumerate(limits) if limit > 0]
    chosen = [NO_DRAFT] * len(tasks)
    if not able or max_nodes <= 0:
        return chosen
    try:
        asked = [tasks[index] for index in able]
        drafts = one_for_each(asked, drafter.propose(asked))
    except Exception:
        log.exception("drafter %s failed; this step goes on without it", drafter.name)
        return chosen
    for index, draft in zip(able, drafts, strict=True):
        tree: DraftTree = draft.tree.cut(min(limits[index], max_nodes))
        if tree:
            chosen[index] = ChosenDraft(tree, drafter.name)
            max_nodes -= len(tree)
    return chosen
