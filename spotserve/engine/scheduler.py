"""Which tokens the next step computes.

Continuous batching: every step is put together anew, running sequences first by one token each, then pieces of prompts (of
running sequences, then of waiting ones), then draft tokens, all under `max_step_tokens`. Blocks for all known tokens are taken
when a sequence is admitted, so only decoding can run out of them: then the youngest sequence is evicted and later computed
again from its tokens.

Invariants: a step never exceeds its budget; the most senior sequence always makes progress, and waiting sequences are admitted
in order of seniority, so every sequence ends. Knows no tensors and no time.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spotserve.engine.blocks import BlockPool
from spotserve.engine.sequence import Seniority, Sequence
from spotserve.speculation.tree import EMPTY_TREE, DraftTree

ProposeDraft = Callable[[Sequence, int], DraftTree]
"""A draft for a sequence, of at most so many nodes."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The next `num_tokens` known tokens of a sequence, and a draft to verify after them."""

    sequence: Sequence
    num_tokens: int
    draft: DraftTree = EMPTY_TREE

    def __post_init__(self) -> None:
        assert 1 <= self.num_tokens <= self.sequence.pending_tokens
        assert not self.draft or self.samples

    @property
    def samples(self) -> bool:
        """Whether the last known token is among them, so that a new one follows."""
        return self.num_tokens == self.sequence.pending_tokens


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step."""

    entries: tuple[ScheduledSequence, ...]
    evicted: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows of the step, drafts included."""
        return sum(entry.num_tokens + len(entry.draft) for entry in self.entries)


class Scheduler:
    """Owns the order of sequences and their blocks."""

    def __init__(self, *, blocks: BlockPool, max_batch: int, max_step_tokens: int, context_tokens: int) -> None:
        assert max_batch >= 1 and max_step_tokens >= 1
        assert blocks.blocks_for(context_tokens) <= blocks.num_blocks, "the longest sequence must fit alone"
        self._blocks = blocks
        self._max_running = min(max_batch, max_step_tokens)
        self._max_step_tokens = max_step_tokens
        self._context_tokens = context_tokens
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none."""
        return len(self._waiting)

    def sequences(self) -> Iterator[Sequence]:
        """All of them, running ones first."""
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence wait for admission."""
        insort(self._waiting, sequence, key=_seniority)

    def adopt(self, sequence: Sequence) -> bool:
        """Admits a sequence whose KV comes from elsewhere; False when there is no room for it now."""
        if len(self._running) >= self._max_running or not self._blocks.grow(sequence.block_ids, num_tokens=len(sequence.token_ids)):
            return False
        insort(self._running, sequence, key=_seniority)
        return True

    def remove(self, sequence: Sequence) -> None:
        """Drops a sequence and gives its blocks back."""
        self._blocks.shrink(sequence.block_ids, num_tokens=0)
        (self._running if sequence in self._running else self._waiting).remove(sequence)

    def settle(self, sequence: Sequence) -> None:
        """Gives back blocks that only rejected drafts needed."""
        self._blocks.shrink(sequence.block_ids, num_tokens=len(sequence.token_ids))

    def schedule(self, propose: ProposeDraft | None = None) -> Schedule:
        """The next step; sequences it evicts wait again."""
        evicted: list[Sequence] = []
        decoding = self._decode(evicted)
        budget = self._max_step_tokens - len(decoding)
        prompts: list[ScheduledSequence] = []
        for sequence in self._running:
            if budget and sequence.pending_tokens > 1:
                prompts.append(ScheduledSequence(sequence, min(sequence.pending_tokens, budget)))
                budget -= prompts[-1].num_tokens
        while budget and not evicted:
            admitted = self._admit()
            if admitted is None:
                break
            prompts.append(ScheduledSequence(admitted, min(admitted.pending_tokens, budget)))
            budget -= prompts[-1].num_tokens
        entries: list[ScheduledSequence] = []
        for sequence in decoding:
            entries.append(ScheduledSequence(sequence, 1, self._draft(sequence, budget, propose)))
            budget -= len(entries[-1].draft)
        return Schedule((*entries, *prompts), tuple(evicted))

    def check_integrity(self) -> None:
        """Asserts that blocks are accounted for and that no sequence is twice in the books."""
        self._blocks.check_integrity(sequence.block_ids for sequence in self._running)
        assert not any(sequence.block_ids for sequence in self._waiting)
        assert len({id(sequence) for sequence in self.sequences()}) == len(self._running) + len(self._waiting)

    def _decode(self, evicted: list[Sequence]) -> list[Sequence]:
        """Running sequences that lack one token, each with room for it; evicts the youngest until there is room."""
        decoding: list[Sequence] = []
        position = 0
        while position < len(self._running):  # the list shrinks from its young end while we walk from the senior end
            sequence = self._running[position]
            while not self._blocks.grow(sequence.block_ids, num_tokens=len(sequence.token_ids)):
                evicted.append(self._evict_youngest())
                if evicted[-1] is sequence:
                    return decoding
            if sequence.pending_tokens == 1:
                decoding.append(sequence)
            position += 1
        return decoding

    def _evict_youngest(self) -> Sequence:
        sequence = self._running.pop()
        self._blocks.shrink(sequence.block_ids, num_tokens=0)
        sequence.lose_cache()
        insort(self._waiting, sequence, key=_seniority)
        return sequence

    def _admit(self) -> Sequence | None:
        """The most senior waiting sequence, if it fits and leaves each running one a block to grow into."""
        if not self._waiting or len(self._running) >= self._max_running:
            return None
        sequence = self._waiting[0]
        if self._running and self._blocks.blocks_for(len(sequence.token_ids)) + len(self._running) > self._blocks.free_blocks:
            return None
        admitted = self._blocks.grow(sequence.block_ids, num_tokens=len(sequence.token_ids))
        assert admitted, "a sequence alone must fit"
        insort(self._running, self._waiting.pop(0), key=_seniority)
        return sequence

    def _draft(self, sequence: Sequence, budget: int, propose: ProposeDraft | None) -> DraftTree:
        """A draft that fits budget, output, context and free blocks; never worth an eviction."""
        known = len(sequence.token_ids)
        room = (len(sequence.block_ids) + self._blocks.free_blocks) * self._blocks.block_tokens - known
        limit = min(budget, sequence.remaining_tokens - 1, self._context_tokens - known - 1, room)
        if propose is None or limit <= 0:
            return EMPTY_TREE
        draft = propose(sequence, limit).cut(limit)
        grown = self._blocks.grow(sequence.block_ids, num_tokens=known + len(draft))
        assert grown
        return draft


def _seniority(sequence: Sequence) -> Seniority:
    return sequence.seniority
