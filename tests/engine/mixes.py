"""Random steps over known texts: whatever a scheduler, a drafter and a short cache could make of them, and more.

Every step computes pieces of some texts side by side: chunks of a prompt, single tokens, chains and trees of draft tokens of which
some are right; between steps sequences lose their cache and start again in other blocks. As the texts are known, every row on a
true path has logits to compare with those of a lone run, token by token.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from spotserve.core.request import Request, SamplingParams
from spotserve.engine.attention import KvCache
from spotserve.engine.batch import RowLayout, slot_of
from spotserve.engine.scheduler import ScheduledSequence
from spotserve.engine.sequence import Sequence as Progress
from spotserve.engine.sequence import new_sequence
from spotserve.speculation.speculator import ChosenDraft
from spotserve.speculation.tree import EMPTY_TREE, ROOT, DraftTree
from tests.engine.stage_scene import BLOCK_TOKENS, Pipeline


@dataclass(frozen=True)
class Seen:
    """Logits after the token at `position` of a text."""

    text: int
    position: int
    logits: torch.Tensor


def lone_run(pipeline: Pipeline, text: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of a text that is alone, one token per step."""
    sequence = _progress("lone", text[:1], range(1, 1 + _blocks(len(text))))
    logits = []
    for token_id in (*text[1:], 0):
        layout = RowLayout((ScheduledSequence(sequence, 1),), block_tokens=BLOCK_TOKENS).build()
        logits.append(pipeline.step(layout, [0])[0].clone())
        sequence.advance(1)
        sequence.token_ids.append(token_id)
    return torch.stack(logits)


class Mixes:
    """Steps of one engine over `texts`, for ever."""

    def __init__(self, pipeline: Pipeline, texts: Sequence[Sequence[int]], *, seed: int) -> None:
        self._pipeline, self._texts, self._random = pipeline, texts, random.Random(seed)
        blocks = sum(_blocks(len(text)) for text in texts)
        self._free = list(range(1, 1 + blocks))
        self._random.shuffle(self._free)
        self._running = [self._start(number) for number in range(len(texts))]

    def steps(self, count: int) -> Iterator[list[Seen]]:
        """Computes `count` steps; of each, what can be compared."""
        for _ in range(count):
            chosen = self._random.sample(range(len(self._texts)), self._random.randint(1, len(self._texts)))
            entries = [self._entry(number) for number in chosen]
            rows = RowLayout(entries, block_tokens=BLOCK_TOKENS)
            layout = rows.build()
            wanted = [row for of_entry in rows.sampled_rows for row in of_entry]
            logits = iter(self._pipeline.step(layout, wanted or [0]).clone())
            yield [
                seen
                for number, entry, sampled in zip(chosen, entries, rows.sampled_rows, strict=True)
                for seen in self._apply(number, entry, [next(logits) for _ in sampled])
            ]

    def _start(self, number: int) -> Progress:
        text = self._texts[number]
        held = [self._free.pop() for _ in range(_blocks(len(text)))]
        return _progress(str(number), text[: self._random.randint(1, len(text) - 1)], held)

    def _entry(self, number: int) -> ScheduledSequence:
        """A piece of a text; it starts again where it ended, and at times where it had not."""
        sequence, text = self._running[number], self._texts[number]
        if len(sequence.token_ids) >= len(text) - 1 or self._random.random() < 0.05:
            self._free.extend(sequence.block_ids)
            self._random.shuffle(self._free)
            sequence = self._running[number] = self._start(number)
        pending = sequence.pending_tokens
        num_tokens = self._random.choice([pending, self._random.randint(1, pending)])
        draft = EMPTY_TREE
        if num_tokens == pending and self._random.random() < 0.6:
            draft = self._draft(text[len(sequence.token_ids) : len(text) - 1])
        return ScheduledSequence(sequence, num_tokens, ChosenDraft(draft, "test"))

    def _draft(self, ahead: Sequence[int]) -> DraftTree:
        """A tree whose tokens are right half of the time, some of them next to wrong ones."""
        tokens: list[int] = []
        parents: list[int] = []
        for node in range(self._random.randint(0, min(9, len(ahead)))):
            parents.append(self._random.randint(max(ROOT, node - 3), node - 1))
            depth = len(DraftTree((*tokens, 0), tuple(parents)).path(node)) - 1
            tokens.append(ahead[depth] if self._random.random() < 0.7 else self._random.choice(ahead))
        return DraftTree(tuple(tokens), tuple(parents))

    def _apply(self, number: int, entry: ScheduledSequence, logits: list[torch.Tensor]) -> list[Seen]:
        """Notes a step's tokens and goes on along the longest right branch; all right branches are seen."""
        sequence, draft, text = entry.sequence, entry.draft, self._texts[number]
        sequence.advance(entry.num_tokens)
        if not logits:
            return []
        known = len(sequence.token_ids)
        seen, accepted = [Seen(number, known - 1, logits[0])], ()
        for node in range(len(draft)):
            path = draft.path(node)
            if list(draft.path_token_ids(node)) == list(text[known : known + len(path)]):
                seen.append(Seen(number, known - 1 + len(path), logits[1 + node]))
                accepted = max(accepted, path, key=len)
        for caches in self._pipeline.caches:
            for cache in caches:
                _put_in_place(cache, sequence, accepted)
        sequence.token_ids.extend(text[known : known + len(accepted) + 1])
        sequence.advance(len(accepted))
        return seen


def _put_in_place(cache: KvCache, sequence: Progress, accepted: Sequence[int]) -> None:
    known = len(sequence.token_ids)
    moves = [(known + node, known + depth) for depth, node in enumerate(accepted) if node != depth]
    if moves:
        slots = [[slot_of(sequence.block_ids, place, BLOCK_TOKENS) for place in move] for move in moves]
        cache.move(sources=[source for source, _ in slots], destinations=[to for _, to in slots])


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def _progress(name: str, known: Sequence[int], block_ids: Sequence[int]) -> Progress:
    request = Request(request_id=name, prompt_token_ids=tuple(known), sampling=SamplingParams(max_tokens=10_000))
    sequence = new_sequence(request, seniority=(0.0, 0), end_token_ids=(), emitted_token_ids=())
    sequence.block_ids.extend(block_ids)
    return sequence
