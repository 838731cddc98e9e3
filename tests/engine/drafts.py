"""Drafts that say what a test wants them to say."""

from collections.abc import Callable, Mapping, Sequence

from spotserve.engine.scheduler import DraftRoom, ProposeDrafts
from spotserve.speculation.drafter import Draft, DraftTask
from spotserve.speculation.fixed import FixedSpeculator
from spotserve.speculation.speculator import ChosenDraft, SequenceState, Speculator, StepSeen
from spotserve.speculation.tree import DraftTree


def chains_of(token_id: int, *, most: int = 10**6) -> ProposeDrafts:
    """For a scheduler: this token again and again for every sequence, up to `most` and to what has room."""

    def propose(room: DraftRoom) -> list[ChosenDraft]:
        return [ChosenDraft(DraftTree.chain([token_id] * min(limit, most)), "test") for limit in room.limits]

    return propose


class DrafterOf:
    """A drafter made of a function of a task."""

    name = "test"

    def __init__(self, draft: Callable[[DraftTask], DraftTree]) -> None:
        self._draft = draft

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        trees = [self._draft(task) for task in tasks]
        return [Draft(tree, (0.5,) * len(tree)) for tree in trees]

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        pass


class Oracle:
    """Drafts for engines: knows the whole text of every sequence, and is right for as many tokens as it is told."""

    def __init__(self, texts: Mapping[str, Sequence[int]], *, right: Callable[[DraftTask], int], wrong: int = 0) -> None:
        """`right`: how many tokens of a draft are; `wrong`: how many others follow them, and are not."""
        self._texts = texts
        self._right = right
        self._wrong = wrong

    def draft(self, task: DraftTask) -> DraftTree:
        """A chain."""
        known = len(task.token_ids)
        right = min(self._right(task), max(0, len(self._texts[task.sequence_id]) - known - 1))
        ahead = [*self._texts[task.sequence_id][known : known + right + 1], 0]
        wrong = [(ahead[right] + 1 + place) % 96 for place in range(self._wrong)]
        return DraftTree.chain([*ahead[:right], *wrong])

    def speculator(self, *, max_depth: int = 16) -> FixedSpeculator:
        """It, and everything that it drafts."""
        return FixedSpeculator(DrafterOf(self.draft), max_depth=max_depth)


class Recorded:
    """A speculator that notes what the engine asks and tells."""

    def __init__(self, inner: Speculator) -> None:
        self._inner = inner
        self.max_depth = inner.max_depth
        self.proposed: list[tuple[tuple[DraftTask, ...], tuple[int, ...], int, int]] = []
        """Tasks, limits, prompt rows and room of each call."""
        self.known: list[tuple[int, ...]] = []
        """How long the texts of the tasks were then."""
        self.chosen: list[Sequence[ChosenDraft]] = []
        self.observed: dict[str, list[int]] = {}
        self.steps: list[StepSeen] = []
        self.forgotten: dict[str, list[int]] = {}
        self.adopted: dict[str, SequenceState] = {}
        self.deadlines: list[float | None] = []

    def propose(
        self, tasks: Sequence[DraftTask], limits: Sequence[int], *, prompt_rows: int, max_nodes: int
    ) -> Sequence[ChosenDraft]:
        self.proposed.append((tuple(tasks), tuple(limits), prompt_rows, max_nodes))
        self.known.append(tuple(len(task.token_ids) for task in tasks))
        chosen = self._inner.propose(tasks, limits, prompt_rows=prompt_rows, max_nodes=max_nodes)
        self.chosen.append(chosen)
        return chosen

    def observe_tokens(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        self.observed.setdefault(sequence_id, []).extend(token_ids)
        self._inner.observe_tokens(sequence_id, token_ids)

    def observe_step(self, seen: StepSeen) -> None:
        self.steps.append(seen)
        self._inner.observe_step(seen)

    def finish_before(self, deadline_s: float | None) -> None:
        self.deadlines.append(deadline_s)
        self._inner.finish_before(deadline_s)

    def state(self, sequence_id: str) -> SequenceState:
        return self._inner.state(sequence_id)

    def adopt(self, sequence_id: str, state: SequenceState) -> None:
        self.adopted[sequence_id] = state
        self._inner.adopt(sequence_id, state)

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        self.forgotten[sequence_id] = [*token_ids]
        self._inner.forget(sequence_id, token_ids)
