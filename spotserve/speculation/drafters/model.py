"""A small model drafts for the target; and, staged, cheap guesses draft for the small model.

The draft model chooses as the target does, with the same noise, so that the two agree wherever their distributions do. Its answer
is a chain; at every depth its second choice may stand beside the chain as a leaf, since that is what the target says most often
where it does not say the first. Staged (Spector and Re, "Accelerating LLM Inference with Staged Speculative Decoding", arXiv
2308.04623): a drafter without a model proposes how the draft model goes on, and one pass of it verifies several tokens. By the
same law as above it, that changes what a draft costs and never what it says.

Knows tokens and passes; what a pass is, is behind the Protocol.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from spotserve.speculation.drafter import EMPTY_DRAFT, Draft, DraftTask, DraftWork, GoOn
from spotserve.speculation.tree import ROOT, DraftTree

MOST_REBUILT_TOKENS: Final = 256
"""Of one sequence in one step: a longer text is computed over several, in which others draft for it."""
_LEAST_SECOND: Final = 0.05
"""Confidence from which a second choice stands beside the first."""


class Guess(NamedTuple):
    """What the draft model says after some token."""

    token_id: int
    confidence: float
    second_token_id: int
    second_confidence: float


@dataclass(slots=True)
class Continuation:
    """A sequence as the draft model sees it: known tokens, then what it has drafted in this step."""

    task: DraftTask
    drafted: list[int] = field(default_factory=list)
    proposed: tuple[int, ...] = ()
    """How it may go on, for the next pass to verify."""


class FirstStage(Protocol):
    """Guesses how the draft model goes on."""

    def guess(self, task: DraftTask, drafted: Sequence[int], max_tokens: int) -> Sequence[int]:
        """The next tokens of a sequence if `drafted` came after those it has, which they may not."""
        ...

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """See `Drafter.forget`."""
        ...


class DraftModel(Protocol):
    """Runs the draft model over a KV cache of its own."""

    def lag(self, task: DraftTask) -> int:
        """Tokens of the sequence that are not in the cache; at least 1."""
        ...

    def run(self, continuations: Sequence[Continuation]) -> list[list[Guess] | None]:
        """One pass.

        Returns:
            per sequence the guess after its last token and, if that is the first of `proposed`, the one after it, and so on; empty
            when its text is still being computed, None when there is no room for it in the cache.
        """
        ...

    @property
    def rows(self) -> int:
        """That the last pass computed."""
        ...

    def forget(self, sequence_id: str) -> None:
        """Frees the sequence's part of the cache. No-op when unknown."""
        ...


@dataclass(slots=True)
class _Chain:
    """A draft in the making."""

    continuation: Continuation
    guesses: list[Guess] = field(default_factory=list)
    is_open: bool = True


class DraftModelDrafter:
    """A `spotserve.speculation.drafter.ModelDrafter`."""

    def __init__(self, model: DraftModel, *, first_stage: FirstStage | None = None, second_choices: bool = True) -> None:
        """Drafts with `model`.

        Args:
            model: the draft model.
            first_stage: drafts for it; None: it says every token by itself.
            second_choices: whether drafts are trees of the first choices and the second ones beside them, or chains.
        """
        self._model = model
        self._first_stage = first_stage
        self._second_choices = second_choices
        self._passes = self._rows = 0

    @property
    def name(self) -> str:
        """`staged` where something drafts for the model."""
        return "model" if self._first_stage is None else "staged"

    @property
    def work(self) -> DraftWork:
        """See `ModelDrafter.work`."""
        return DraftWork(self._passes, self._rows)

    def lag(self, task: DraftTask) -> int:
        """See `ModelDrafter.lag`."""
        return self._model.lag(task)

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        """Drafts of `max_depth`."""
        return self.propose_while(tasks, lambda _, confidences: [at for at, value in enumerate(confidences) if value >= 0])

    def propose_while(self, tasks: Sequence[DraftTask], go_on: GoOn) -> list[Draft]:
        """See `ModelDrafter.propose_while`."""
        self._passes = self._rows = 0
        chains = [_Chain(Continuation(task)) for task in tasks]
        going = list(range(len(chains)))
        judged = 0
        while going:
            self._propose_first([chains[at] for at in going])
            self._pass([chains[at] for at in going])
            going = [at for at in going if chains[at].is_open]
            # A pass may bring several tokens to some: each depth is judged once all that go on have reached it.
            while going and (depth := min(len(chains[at].guesses) for at in going)) > judged:
                judged += 1
                live = set(going)
                confidences = [
                    chain.guesses[judged - 1].confidence if at in live and judged <= depth else -1.0
                    for at, chain in enumerate(chains)
                ]
                wanted = set(go_on(judged, confidences))
                going = [at for at in going if at in wanted and len(chains[at].guesses) < tasks[at].max_depth]
        return [self._draft(chain) for chain in chains]

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """See `Drafter.forget`."""
        self._model.forget(sequence_id)
        if self._first_stage is not None:
            self._first_stage.forget(sequence_id, token_ids)

    def _propose_first(self, chains: Sequence[_Chain]) -> None:
        """Asks the first stage how each may go on, for as many tokens as are wanted beyond the one that the pass gives anyway."""
        if self._first_stage is None:
            return
        for chain in chains:
            task, drafted = chain.continuation.task, chain.continuation.drafted
            max_tokens = task.max_depth - len(chain.guesses) - 1
            if max_tokens > 0:
                chain.continuation.proposed = tuple(self._first_stage.guess(task, drafted, max_tokens))

    def _pass(self, chains: Sequence[_Chain]) -> None:
        answers = self._model.run([chain.continuation for chain in chains])
        self._passes += self._model.rows > 0
        self._rows += self._model.rows
        for chain, answer in zip(chains, answers, strict=True):
            chain.continuation.proposed = ()
            if not answer:
                chain.is_open = False
                continue
            for guess in answer[: chain.continuation.task.max_depth - len(chain.guesses)]:
                chain.guesses.append(guess)
                chain.continuation.drafted.append(guess.token_id)

    def _draft(self, chain: _Chain) -> Draft:
        """The chain first, then second choices beside it."""
        guesses = chain.guesses
        if not guesses:
            return EMPTY_DRAFT
        token_ids = [guess.token_id for guess in guesses]
        parents = list(range(ROOT, len(guesses) - 1))
        confidences = [guess.confidence for guess in guesses]
        if self._second_choices:
            for depth, guess in enumerate(guesses):
                if guess.second_confidence >= _LEAST_SECOND:
                    token_ids.append(guess.second_token_id)
                    parents.append(depth - 1)
                    confidences.append(guess.second_confidence)
        return Draft(DraftTree(tuple(token_ids), tuple(parents)), tuple(confidences))
