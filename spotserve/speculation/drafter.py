"""What is asked of whoever guesses ahead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from spotserve.core.request import SamplingParams
from spotserve.speculation.tree import EMPTY_TREE, DraftTree


@dataclass(frozen=True, slots=True)
class DraftTask:
    """A sequence that a draft is wanted for."""

    sequence_id: str
    token_ids: Sequence[int]
    """Prompt and output; between calls it only grows."""
    max_depth: int
    """Tokens on the longest path of the draft, at most; at least 1."""
    num_prompt_tokens: int = 1
    """How many of `token_ids` are the prompt."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=2**31))
    """How the target chooses; a drafter that samples chooses likewise, with the same noise."""
    banned_token_ids: tuple[int, ...] = ()
    """What `sampling.min_tokens` forbids."""
    partition: str = ""
    """Sequences of different partitions must learn nothing from each other: one's text could be read off the other's speed."""

    @property
    def remaining_tokens(self) -> int:
        """Output tokens that may still come."""
        return self.sampling.max_tokens + self.num_prompt_tokens - len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Draft:
    """A guess, and how sure its drafter is."""

    tree: DraftTree = EMPTY_TREE
    confidences: tuple[float, ...] = ()
    """Per node: the drafter's estimate, 0 to 1, that the target says this token after the node's parent. It need not be
    calibrated, only monotone: what it is worth is learned."""

    def __post_init__(self) -> None:
        assert len(self.confidences) == len(self.tree)


EMPTY_DRAFT: Final = Draft()
"""No guess."""


class Drafter(Protocol):
    """Guesses the next tokens of sequences. Any guess is safe: none can change an answer, only its speed."""

    @property
    def name(self) -> str:
        """In settings, metrics and answers."""
        ...

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        """A draft for each task; `EMPTY_DRAFT` where it has no idea.

        It may raise anything: the step then goes on without it.
        """
        ...

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """The sequence is over, here at least, with these tokens. No-op when unknown."""
        ...


class DraftWork(NamedTuple):
    """What drafting took of a model."""

    passes: int
    rows: int


GoOn = Callable[[int, Sequence[float]], Sequence[int]]
"""After a pass of a draft model: which tasks are worth another. Called with the depth that was reached and, per task, the
confidence of its node at that depth (below 0: it has none); gives indices of tasks."""


class ModelDrafter(Drafter, Protocol):
    """A drafter that computes: its passes cost, so it is told when to stop."""

    @property
    def work(self) -> DraftWork:
        """Of the last call."""
        ...

    def lag(self, task: DraftTask) -> int:
        """Tokens of a sequence that it has to compute before it can draft: the whole text after a migration, 1 or 2 while it drafts
        at every step."""
        ...

    def propose_while(self, tasks: Sequence[DraftTask], go_on: GoOn) -> list[Draft]:
        """`propose`, which ends early where `go_on` says so."""
        ...


def one_for_each(tasks: Sequence[DraftTask], drafts: Sequence[Draft]) -> Sequence[Draft]:
    """The drafts, if there is one for each task.

    Raises:
        ValueError: there is not; whose draft is whose cannot be known.
    """
    if len(drafts) != len(tasks):
        raise ValueError(f"{len(drafts)} drafts for {len(tasks)} tasks: expected one for each, in their order")
    return drafts
