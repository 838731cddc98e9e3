"""A draft model on one device: whole, with a paged KV cache of its own, batched.

A sequence's KV follows its text: what was drafted and not accepted is overwritten, what another machine computed is computed
again in pieces, and when blocks are short those go that have not drafted for the longest time. None of it is ever moved.
"""

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass

import torch

from spotserve.core.request import Request
from spotserve.engine.batch import RowLayout
from spotserve.engine.blocks import BlockPool
from spotserve.engine.ranks.rank import Rank
from spotserve.engine.runner import sampling_rows
from spotserve.engine.sampler import Sampler, is_plain_greedy
from spotserve.engine.scheduler import ScheduledSequence
from spotserve.engine.sequence import Sequence, new_sequence
from spotserve.speculation.drafter import DraftTask
from spotserve.speculation.drafters.model import MOST_REBUILT_TOKENS, Continuation, Guess
from spotserve.speculation.speculator import ChosenDraft
from spotserve.speculation.tree import DraftTree


@dataclass(slots=True)
class _Followed:
    """A sequence, and how much of its text is the target's."""

    sequence: Sequence
    known_tokens: int = 0
    last_used: int = 0


class PagedDraftModel:
    """See `spotserve.speculation.drafters.model.DraftModel`. Owner of its cache; used by one thread."""

    def __init__(self, rank: Rank, *, num_blocks: int, vocabulary_size: int, context_tokens: int) -> None:
        """Takes over `rank`: alone, the whole model, with a cache of `num_blocks` blocks beside the scratch block."""
        self._rank = rank
        self._context_tokens = context_tokens
        self._blocks = BlockPool(num_blocks=num_blocks, block_tokens=rank.cache.block_tokens, first_block_id=1)
        self._sampler = Sampler(vocabulary_size=vocabulary_size, device=rank.cache.device)
        self._followed: dict[str, _Followed] = {}
        self._passes = 0
        self._rows = 0

    @property
    def rows(self) -> int:
        """See `DraftModel.rows`."""
        return self._rows

    @property
    def kv_tokens_used(self) -> int:
        """Tokens' worth of blocks that are held."""
        return self._blocks.used_blocks * self._blocks.block_tokens

    def lag(self, task: DraftTask) -> int:
        """See `DraftModel.lag`."""
        followed = self._followed.get(task.sequence_id)
        if followed is None:
            return len(task.token_ids)
        return max(1, len(task.token_ids) - _agreeing(followed, task.token_ids))  # the last token is computed in any case

    def run(self, continuations: ReadOnly[Continuation]) -> list[list[Guess] | None]:
        """See `DraftModel.run`."""
        self._passes += 1
        for continuation in continuations:
            if continuation.drafted:  # nobody takes the room of a draft in the making
                self._followed[continuation.task.sequence_id].last_used = self._passes
        entries: list[ScheduledSequence | None] = [self._entry(continuation) for continuation in continuations]
        present = [entry for entry in entries if entry is not None]
        if not present:
            self._rows = 0
            return [None] * len(entries)
        guesses = iter(self._compute(present))
        answers: list[list[Guess] | None] = []
        for entry in entries:
            if entry is None:
                answers.append(None)
                continue
            entry.sequence.advance(entry.num_tokens)
            found = [next(guesses) for _ in range(1 + len(entry.draft))] if entry.samples else []
            answers.append(_agreed(found, entry.draft.token_ids))
            kept = len(answers[-1] or ()) - 1
            if kept > 0:  # their KV is in place: the chain waits in the slots of its positions
                entry.sequence.token_ids.extend(entry.draft.token_ids[:kept])
                entry.sequence.computed_tokens += kept
        return answers

    def forget(self, sequence_id: str) -> None:
        """See `DraftModel.forget`."""
        followed = self._followed.pop(sequence_id, None)
        if followed is not None:
            self._blocks.shrink(followed.sequence.block_ids, num_tokens=0)

    def check_integrity(self) -> None:
        """Asserts that blocks are accounted for."""
        self._blocks.check_integrity([followed.sequence.block_ids for followed in self._followed.values()])

    def _entry(self, continuation: Continuation) -> ScheduledSequence | None:
        """What the next pass computes of a sequence; None when the cache or the model's context is too short for it."""
        task = continuation.task
        followed = self._followed.get(task.sequence_id)
        if followed is None:
            followed = self._followed[task.sequence_id] = _Followed(_sequence_of(task))
        followed.last_used = self._passes
        sequence = followed.sequence
        agreeing = _agreeing(followed, task.token_ids) if not continuation.drafted else sequence.computed_tokens
        if not continuation.drafted:
            sequence.token_ids[followed.known_tokens :] = task.token_ids[followed.known_tokens :]
            followed.known_tokens = len(task.token_ids)
        else:
            sequence.token_ids[followed.known_tokens :] = continuation.drafted
        sequence.computed_tokens = min(agreeing, len(sequence.token_ids) - 1)
        num_tokens = min(sequence.pending_tokens, MOST_REBUILT_TOKENS)
        proposed = continuation.proposed if num_tokens == sequence.pending_tokens else ()
        needed = len(sequence.token_ids) + len(proposed)
        if needed > self._context_tokens or not self._make_room(sequence, needed):
            return None
        return ScheduledSequence(sequence, num_tokens, ChosenDraft(DraftTree.chain(proposed), ""))

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Those that have not drafted for the longest time give way, of equals the latest; nobody does in vain."""
        if self._blocks.grow(sequence.block_ids, num_tokens=num_tokens):
            return True
        idle = [f for f in self._followed.values() if f.last_used < self._passes and f.sequence.block_ids]
        leaving = [followed.sequence.block_ids for followed in idle]
        if self._blocks.lacking(num_tokens=num_tokens, shared=sequence.block_ids, leaving=leaving) > 0:
            return False
        idle.sort(key=lambda followed: followed.last_used, reverse=True)
        while not self._blocks.grow(sequence.block_ids, num_tokens=num_tokens):
            self.forget(idle.pop().sequence.request_id)
        return True

    def _compute(self, entries: ReadOnly[ScheduledSequence]) -> list[Guess]:
        rows = RowLayout(entries, block_tokens=self._blocks.block_tokens)
        layout = rows.build()
        self._rows = len(layout.token_ids)
        wanted = [row for of_entry in rows.sampled_rows for row in of_entry]
        with torch.inference_mode():
            logits = self._rank.forward(layout, wanted)
            if logits is None or not wanted:
                return []
            plain = all(is_plain_greedy(entry.sequence.request.sampling) for entry in entries)
            sampling = None if plain else [row for entry in entries for row in sampling_rows(entry)]
            return [Guess(*guess) for guess in self._sampler.two_best(logits, sampling)]


def _sequence_of(task: DraftTask) -> Sequence:
    request = Request(
        request_id=task.sequence_id, prompt_token_ids=tuple(task.token_ids[: task.num_prompt_tokens]), sampling=task.sampling
    )
    sequence = new_sequence(request, seniority=(0, 0.0, 0), end_token_ids=(), emitted_token_ids=())
    sequence.token_ids.clear()
    sequence.banned_token_ids = task.banned_token_ids
    return sequence


def _agreeing(followed: _Followed, token_ids: ReadOnly[int]) -> int:
    """Tokens in the cache that are the target's: those known before, and what was drafted and accepted."""
    sequence, at = followed.sequence, followed.known_tokens
    if sequence.computed_tokens < at:
        return sequence.computed_tokens
    end = min(sequence.computed_tokens, len(token_ids), len(sequence.token_ids))
    while at < end and sequence.token_ids[at] == token_ids[at]:
        at += 1
    return at


def _agreed(guesses: list[Guess], proposed: tuple[int, ...]) -> list[Guess]:
    """The model's own way as far as the proposal goes along with it, and one guess further."""
    kept = guesses[:1]
    for guess, token_id in zip(guesses[1:], proposed, strict=True):
        if kept[-1].token_id != token_id:
            break
        kept.append(guess)
    return kept
