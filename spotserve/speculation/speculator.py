"""What the engine asks for before every step, and tells after it: one decision for the whole batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from spotserve.speculation.acceptance import SequenceAcceptance
from spotserve.speculation.drafter import DraftTask
from spotserve.speculation.tree import EMPTY_TREE, DraftTree

SequenceState = Mapping[str, SequenceAcceptance]
"""What was learned of one sequence, by drafter."""


@dataclass(frozen=True, slots=True)
class ChosenDraft:
    """What is verified of one sequence."""

    tree: DraftTree
    drafter: str
    """Who drafted it; empty: nobody."""


NO_DRAFT: Final = ChosenDraft(EMPTY_TREE, "")
"""Plain decoding."""


@dataclass(frozen=True, slots=True)
class StepSeen:
    """What came of a step."""

    sequences: int
    """That got tokens."""
    rows: int
    draft_nodes: int
    """Rows that were drafts."""
    kv_tokens: int
    """Tokens of context that it read, once for each sequence."""
    draft_kv_tokens: int
    """Tokens of context that the rows of drafts read, sum over rows."""
    tokens: int
    """That it committed."""
    prompt_rows: int
    step_s: float
    """From the end of the step before, drafting included."""


class Speculator(Protocol):
    """Decides what is drafted by whom and how much of it is verified. Single-threaded."""

    @property
    def max_depth(self) -> int:
        """Of its drafts."""
        ...

    def propose(
        self, tasks: Sequence[DraftTask], limits: Sequence[int], *, prompt_rows: int, max_nodes: int
    ) -> Sequence[ChosenDraft]:
        """A draft for each task, of `limits` nodes at most and of `max_nodes` together.

        Args:
            tasks: sequences that decode in the next step.
            limits: nodes that each has room for; may be 0.
            prompt_rows: rows of prompts in the same step.
            max_nodes: rows that the step has left.
        """
        ...

    def observe_tokens(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """The next tokens of a sequence are known."""
        ...

    def observe_step(self, seen: StepSeen) -> None:
        """A step is over, and its tokens were observed."""
        ...

    def finish_before(self, deadline_s: float | None) -> None:
        """By when, on the clock of `time.perf_counter`, sequences should end, because the machine goes then; None: at no time."""
        ...

    def state(self, sequence_id: str) -> SequenceState:
        """What was learned of a sequence, for whoever goes on with it."""
        ...

    def adopt(self, sequence_id: str, state: SequenceState) -> None:
        """A sequence comes with what was learned of it elsewhere."""
        ...

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """The sequence is over, here at least, with these tokens. No-op when unknown."""
        ...
