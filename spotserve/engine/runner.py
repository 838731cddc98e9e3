"""Runs one step on tensors: lay out rows, one forward pass, choose tokens, verify drafts.

Knows nothing of waiting, admission or the end of sequences. After a step the cache holds the keys and values of every scheduled
token and of the accepted draft tokens, each in the slot of its position.
"""

from collections.abc import Sequence as ReadOnly

import torch

from spotserve.engine.attention import KvCache
from spotserve.engine.batch import ROW_MULTIPLE, RowLayout, StepRows, slot_of
from spotserve.engine.forward import Forward
from spotserve.engine.sampler import SampledToken, Sampler, SamplingRow, greedy, is_plain_greedy
from spotserve.engine.scheduler import ScheduledSequence
from spotserve.engine.sequence import Sequence
from spotserve.engine.weights import LoadedModel
from spotserve.speculation.tree import ROOT
from spotserve.speculation.verify import accept


class Runner:
    """A model with its cache."""

    def __init__(self, model: LoadedModel, *, cache: KvCache, forward: Forward) -> None:
        self._cache = cache
        self._forward = forward
        self._vocabulary_size = model.spec.vocabulary_size
        self._device = cache.layers[0].device
        self._sampler = Sampler(vocabulary_size=model.spec.vocabulary_size, device=self._device)

    def run(self, entries: ReadOnly[ScheduledSequence]) -> list[list[SampledToken]]:
        """The next tokens of every entry, accepted draft tokens included; none for an entry that does not sample."""
        rows = RowLayout(entries, self._cache).build()
        sampled = self._sample(entries, rows)
        return [self._accept(entry, tokens) for entry, tokens in zip(entries, sampled, strict=True)]

    def logits(self, rows: StepRows, wanted: ReadOnly[int]) -> torch.Tensor:
        """[wanted, vocabulary]. The head sees a full tile of rows as well, see `ROW_MULTIPLE`."""
        padded = [*wanted, *[wanted[-1]] * (-len(wanted) % ROW_MULTIPLE)]
        logits = self._forward(rows, torch.tensor(padded, device=self._device))
        return logits[: len(wanted), : self._vocabulary_size]

    def _sample(self, entries: ReadOnly[ScheduledSequence], rows: StepRows) -> list[list[SampledToken]]:
        """Per entry the target's token after its last known token and after each draft node."""
        wanted = [row for of_entry in rows.sampled_rows for row in of_entry]
        logits = self.logits(rows, wanted or [0])  # prompts in the making need their keys all the same
        if not wanted:
            return [[] for _ in entries]
        if all(is_plain_greedy(entry.sequence.request.sampling) for entry in entries):
            chosen = iter([SampledToken(token_id) for token_id in greedy(logits)])
        else:
            chosen = iter(self._sampler.sample(logits, [row for entry in entries for row in _sampling_rows(entry)]))
        return [[next(chosen) for _ in of_entry] for of_entry in rows.sampled_rows]

    def _accept(self, entry: ScheduledSequence, sampled: list[SampledToken]) -> list[SampledToken]:
        if len(sampled) <= 1:
            return sampled
        token_ids = [token.token_id for token in sampled]
        accepted = accept(entry.draft, root_token_id=token_ids[0], node_token_ids=token_ids[1:])
        self._put_in_place(entry.sequence, accepted.nodes)
        return [sampled[node - ROOT] for node in accepted.rows]

    def _put_in_place(self, sequence: Sequence, nodes: tuple[int, ...]) -> None:
        """Moves accepted nodes from the slots they waited in to those of their positions."""
        known = len(sequence.token_ids)
        moves = [(known + node, known + depth) for depth, node in enumerate(nodes) if node != depth]
        if moves:
            slots = [[slot_of(sequence.block_ids, position, self._cache.block_tokens) for position in move] for move in moves]
            self._cache.move(sources=[source for source, _ in slots], destinations=[to for _, to in slots])


def _sampling_rows(entry: ScheduledSequence) -> list[SamplingRow]:
    """What each sampled row of an entry may look at: its own prefix."""
    if not entry.samples:
        return []
    sequence = entry.sequence
    request = sequence.request
    output = sequence.token_ids[len(request.prompt_token_ids) :]
    return [
        SamplingRow(
            sampling=request.sampling,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=[*output, *entry.draft.path_token_ids(node)],
            banned_token_ids=sequence.banned_token_ids,
        )
        for node in range(ROOT, len(entry.draft))
    ]
