"""Lays the tokens of a step out as rows.

A row is one token: its id, its position, the slot its KV goes to, and where its keys are. Rows that pad their keys to the same
length stand together; long runs of one sequence share one table, other rows bring their own. The number of rows is a
multiple of `ROW_MULTIPLE`, as linear layers compute the rows of an incomplete tile with another kernel, and one of few
(`linear.padded_rows`). Padding rows repeat the last one and write to the scratch block.

A step is laid out once, by the rank that schedules, in plain arrays; every rank of the replica binds it to its own cache: block
numbers mean the same on all of them.
"""

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, replace

import numpy as np
import torch

from spotserve.engine.attention import SCRATCH_BLOCK, KvCache, PagedBatch, RowGroup, padded_blocks
from spotserve.engine.linear import padded_rows
from spotserve.engine.scheduler import ScheduledSequence

ROW_MULTIPLE = 4
"""Measured (oneMKL, x86-64, 1 and 2 threads): from 4 rows on, and in multiples of 4, a row's result does not depend on the others
nor on their number, in float32, float64 and bfloat16; with 5, 6 or 7 rows the last ones differ in the last bit."""
_SHARED_TABLE_ROWS = 16
"""Runs from this length on are worth a call of their own."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive positions of entry `entry`; row `first_offset + i` of it is at position `start + i`."""

    entry: int
    first_offset: int
    start: int
    end: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """A `RowGroup` in plain arrays."""

    start: int
    end: int
    table: np.ndarray
    by_slot: bool
    num_keys: int


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A step in plain arrays of int64, each [rows]."""

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    groups: tuple[GroupLayout, ...]

    def bind(self, cache: KvCache) -> "StepRows":
        """The step on one rank's device and cache."""
        device = cache.device
        positions = torch.from_numpy(self.positions).to(device)
        groups = tuple(
            RowGroup(
                group.start,
                group.end,
                torch.from_numpy(group.table).to(device),
                group.by_slot,
                positions[group.start : group.end],
                group.num_keys,
            )
            for group in self.groups
        )
        return StepRows(
            token_ids=torch.from_numpy(self.token_ids).to(device),
            positions=positions,
            paged=PagedBatch(cache, torch.from_numpy(self.slots).to(device), groups),
        )


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step in tensors, on one rank."""

    token_ids: torch.Tensor
    """[rows]"""
    positions: torch.Tensor
    """[rows]"""
    paged: PagedBatch


def slot_of(block_ids: ReadOnly[int], position: int, block_tokens: int) -> int:
    """Slot of a sequence's `position`-th token."""
    return block_ids[position // block_tokens] * block_tokens + position % block_tokens


class RowLayout:
    """Lays out one step; used once."""

    def __init__(self, entries: ReadOnly[ScheduledSequence], *, block_tokens: int) -> None:
        self._entries = entries
        self._block_tokens = block_tokens
        self._token_ids: list[int] = []
        self._positions: list[int] = []
        self._slots: list[int] = []
        self._groups: list[GroupLayout] = []
        self._sampled: list[dict[int, int]] = [{} for _ in entries]  # entry -> offset in the entry -> row

    @property
    def sampled_rows(self) -> tuple[tuple[int, ...], ...]:
        """Per entry: the row of its last known token, then the row of each draft node; empty when the entry does not sample."""
        return tuple(tuple(rows[node] for node in sorted(rows)) for rows in self._sampled)

    def build(self) -> StepLayout:
        """Lays out all entries."""
        own_table: dict[int, list[_Run]] = {}
        shared_table: list[_Run] = []
        for run in self._runs():
            if run.end - run.start >= _SHARED_TABLE_ROWS or (len(self._entries) == 1 and run.end - run.start > 1):
                shared_table.append(run)
            else:
                own_table.setdefault(run.num_blocks, []).append(run)
        for num_blocks, runs in sorted(own_table.items()):
            self._add_with_own_tables(runs, num_blocks)
        for run in shared_table:
            self._add_with_shared_table(run)
        for entry, scheduled in enumerate(self._entries):
            if not scheduled.draft.is_chain:
                self._add_branches(entry)
        self._pad()
        return StepLayout(
            token_ids=np.array(self._token_ids, dtype=np.int64),
            positions=np.array(self._positions, dtype=np.int64),
            slots=np.array(self._slots, dtype=np.int64),
            groups=tuple(self._groups),
        )

    def _runs(self) -> list[_Run]:
        """Known tokens and chains of draft tokens, cut where the padded length changes."""
        runs = []
        for entry, scheduled in enumerate(self._entries):
            first = scheduled.sequence.computed_tokens
            end = first + scheduled.num_tokens + (len(scheduled.draft) if scheduled.draft.is_chain else 0)
            start = first
            while start < end:
                num_blocks = padded_blocks(start, block_tokens=self._block_tokens)
                stop = min(end, num_blocks * self._block_tokens)
                runs.append(_Run(entry, start - first, start, stop, num_blocks))
                start = stop
        return runs

    def _add_rows(self, run: _Run) -> None:
        scheduled = self._entries[run.entry]
        sequence, draft = scheduled.sequence, scheduled.draft
        known = len(sequence.token_ids)
        first_sampled = scheduled.num_tokens - 1 if scheduled.samples else scheduled.num_tokens + len(draft)
        for position in range(run.start, run.end):
            offset = run.first_offset + position - run.start
            if offset >= first_sampled:
                self._sampled[run.entry][offset - first_sampled] = len(self._token_ids)
            self._token_ids.append(sequence.token_ids[position] if position < known else draft.token_ids[position - known])
            self._positions.append(position)
            self._slots.append(slot_of(sequence.block_ids, position, self._block_tokens))

    def _add_with_own_tables(self, runs: list[_Run], num_blocks: int) -> None:
        start = len(self._token_ids)
        table = np.full((sum(run.end - run.start for run in runs), num_blocks), SCRATCH_BLOCK, dtype=np.int64)
        at = 0
        for run in runs:
            self._add_rows(run)
            held = self._entries[run.entry].sequence.block_ids[:num_blocks]
            table[at : at + run.end - run.start, : len(held)] = held
            at += run.end - run.start
        self._groups.append(GroupLayout(start, len(self._token_ids), table, False, num_blocks * self._block_tokens))

    def _add_with_shared_table(self, run: _Run) -> None:
        start = len(self._token_ids)
        self._add_rows(run)
        table = np.full((1, run.num_blocks), SCRATCH_BLOCK, dtype=np.int64)
        held = self._entries[run.entry].sequence.block_ids[: run.num_blocks]
        table[0, : len(held)] = held
        self._groups.append(GroupLayout(start, len(self._token_ids), table, False, run.num_blocks * self._block_tokens))

    def _add_branches(self, entry: int) -> None:
        """Draft nodes of a branching tree: each sees the sequence and its own ancestors, in the order of positions.

        Node i waits in the slot of position `known + i`, wherever it stands in the tree.
        """
        scheduled = self._entries[entry]
        sequence, draft = scheduled.sequence, scheduled.draft
        known = len(sequence.token_ids)
        slots = [slot_of(sequence.block_ids, position, self._block_tokens) for position in range(known + len(draft))]
        by_keys: dict[int, list[int]] = {}
        for node in range(len(draft)):
            position = known + len(draft.path(node)) - 1
            by_keys.setdefault(padded_blocks(position, block_tokens=self._block_tokens) * self._block_tokens, []).append(node)
        for num_keys, nodes in sorted(by_keys.items()):
            start = len(self._token_ids)
            table = np.full((len(nodes), num_keys), SCRATCH_BLOCK * self._block_tokens, dtype=np.int64)
            for row, node in zip(table, nodes, strict=True):
                path = draft.path(node)
                row[:known] = slots[:known]
                row[known : known + len(path)] = [slots[known + ancestor] for ancestor in path]
                self._sampled[entry][node + 1] = len(self._token_ids)
                self._token_ids.append(draft.token_ids[node])
                self._positions.append(known + len(path) - 1)
                self._slots.append(slots[known + node])
            self._groups.append(GroupLayout(start, len(self._token_ids), table, True, num_keys))

    def _pad(self) -> None:
        rows = padded_rows(len(self._token_ids))
        padding = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE - len(self._token_ids)
        self._token_ids += self._token_ids[-1:] * padding
        self._positions += self._positions[-1:] * padding
        self._slots += [SCRATCH_BLOCK * self._block_tokens] * padding
        last = self._groups[-1]
        table = last.table
        if table.shape[0] == last.end - last.start:
            table = np.concatenate((table, np.repeat(table[-1:], padding, axis=0)))
        self._groups[-1] = replace(last, end=last.end + padding, table=table)
