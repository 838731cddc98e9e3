"""Runs steps on ranks: lay out rows, issue, collect tokens, verify drafts.

Knows nothing of waiting, admission or the end of sequences. After a step was collected, the caches hold the keys and values of
every scheduled token and of the accepted draft tokens, each in the slot of its position.
"""

from collections import deque
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass

from spotserve.engine.batch import RowLayout, slot_of
from spotserve.engine.ranks.leader import Ranks
from spotserve.engine.sampler import SampledToken, SamplingRow, is_plain_greedy, penalizes
from spotserve.engine.scheduler import ScheduledSequence
from spotserve.engine.sequence import Sequence
from spotserve.speculation.tree import ROOT
from spotserve.speculation.verify import accept


@dataclass(frozen=True, slots=True)
class _Issued:
    """A step under way: how many tokens come back for each of its entries."""

    entries: tuple[ScheduledSequence, ...]
    num_sampled: tuple[int, ...]


class Runner:
    """Steps under way on the ranks of a replica, oldest first."""

    def __init__(self, ranks: Ranks, *, block_tokens: int) -> None:
        self._ranks = ranks
        self._block_tokens = block_tokens
        self._issued: deque[_Issued] = deque()

    @property
    def num_issued(self) -> int:
        """Steps that were issued and not collected."""
        return len(self._issued)

    def issue(self, entries: ReadOnly[ScheduledSequence]) -> None:
        """Starts a step.

        Raises:
            PeerLost: a rank is gone.
        """
        rows = RowLayout(entries, block_tokens=self._block_tokens)
        layout = rows.build()
        sampled_rows = rows.sampled_rows
        plain = all(is_plain_greedy(entry.sequence.request.sampling) for entry in entries)
        sampling = None if plain else [row for entry in entries for row in sampling_rows(entry)]
        self._ranks.issue(layout, [row for of_entry in sampled_rows for row in of_entry], sampling)
        self._issued.append(_Issued(tuple(entries), tuple(len(of_entry) for of_entry in sampled_rows)))

    def collect(self) -> list[list[SampledToken]]:
        """The next tokens of every entry of the oldest step, accepted draft tokens included; none for one that does not sample.

        Raises:
            PeerLost: a rank is gone.
        """
        step = self._issued.popleft()
        chosen = iter(self._ranks.collect())
        sampled = [[next(chosen) for _ in range(count)] for count in step.num_sampled]
        return [self._accept(entry, tokens) for entry, tokens in zip(step.entries, sampled, strict=True)]

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
        if moves and sequence.block_ids:  # none: it was cancelled while the step was under way
            slots = [[slot_of(sequence.block_ids, position, self._block_tokens) for position in move] for move in moves]
            self._ranks.move_slots([source for source, _ in slots], [to for _, to in slots])


def sampling_rows(entry: ScheduledSequence) -> list[SamplingRow]:
    """What each sampled row of an entry may look at: its own prefix."""
    if not entry.samples:
        return []
    sequence = entry.sequence
    request = sequence.request
    looks_back = penalizes(request.sampling)
    output = sequence.token_ids[len(request.prompt_token_ids) :] if looks_back else []
    rows = []
    for node in range(ROOT, len(entry.draft)):
        path = entry.draft.path_token_ids(node)
        rows.append(
            SamplingRow(
                sampling=request.sampling,
                position=sequence.output_tokens + len(path),
                prompt_token_ids=request.prompt_token_ids if looks_back else (),
                output_token_ids=[*output, *path] if looks_back else (),
                banned_token_ids=sequence.banned_token_ids,
            )
        )
    return rows
