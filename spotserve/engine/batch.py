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
from spotserve.engine.device import together
from spotserve.engine.linear import padded_rows
from spotserve.engine.scheduler import ScheduledSequence

ROW_MULTIPLE = 4
"""Measured (oneMKL, x86-64, 1 and 2 threads): from 4 rows on, and in multiples of 4, a row's result does not depend on the others
nor on their number, in float32, float64 and bfloat16; with 5, 6 or 7 rows the last ones differ in the last bit."""
_LONGEST_DRAFT_ROWS = 32
"""A longer run of one sequence is a prompt's, where rows are what costs."""
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
    lanes: np.ndarray | None = None
    lane_of: np.ndarray | None = None
    """Both or neither."""

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Of int64."""
        return (self.table,) if self.lanes is None or self.lane_of is None else (self.table, self.lanes, self.lane_of)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A step in plain arrays of int64, each [rows]."""

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    groups: tuple[GroupLayout, ...]

    def bind(self, cache: KvCache, logit_rows: ReadOnly[int] = ()) -> "StepRows":
        """The step on one rank's device and cache; `logit_rows`: rows whose logits are wanted."""
        layout = self if cache.device.type == "cpu" else self.for_gpu()
        return layout.rows(cache, together(layout.arrays(logit_rows), cache.device))

    def for_gpu(self) -> "StepLayout":
        """The same step in fewer and larger problems. On a GPU a product has other bits with other rows beside it in any case."""
        return rounded(replace(self, groups=tuple(map(in_lanes, joined(self.groups)))))

    def arrays(self, logit_rows: ReadOnly[int]) -> list[np.ndarray]:
        """All that differs between steps of the same shape."""
        wanted = np.array(logit_rows, dtype=np.int64)
        return [self.token_ids, self.positions, self.slots, wanted, *(array for group in self.groups for array in group.arrays)]

    def rows(self, cache: KvCache, tensors: ReadOnly[torch.Tensor]) -> "StepRows":
        """The step, given its `arrays` on the device of the cache."""
        token_ids, positions, slots, logit_rows = tensors[:4]
        further = iter(tensors[4:])
        groups = []
        for group in self.groups:
            table = next(further)
            lanes, lane_of = (None, None) if group.lanes is None else (next(further), next(further))
            of_group = positions[group.start : group.end]
            groups.append(RowGroup(group.start, group.end, table, group.by_slot, of_group, group.num_keys, lanes, lane_of))
        return StepRows(token_ids, positions, PagedBatch(cache, slots, tuple(groups)), logit_rows)


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step in tensors, on one rank."""

    token_ids: torch.Tensor
    """[rows]"""
    positions: torch.Tensor
    """[rows]"""
    paged: PagedBatch
    logit_rows: torch.Tensor
    """[wanted]"""


def joined(groups: ReadOnly[GroupLayout]) -> tuple[GroupLayout, ...]:
    """Neighbours that bring a table for each row made one where that reads less than three times the keys.

    A GPU waits for calls, not for keys: there a few longer rows cost less than one more call per layer.
    """
    found: list[GroupLayout] = []
    for group in groups:
        last = found[-1] if found else None
        if last is None or not (_own_tables(last) and _own_tables(group)):
            found.append(group)
            continue
        keys, rows = max(last.num_keys, group.num_keys), group.end - last.start
        if keys * rows >= 3 * (last.num_keys * (last.end - last.start) + group.num_keys * (group.end - group.start)):
            found.append(group)
            continue
        width = max(last.table.shape[1], group.table.shape[1])
        tables = [
            np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=SCRATCH_BLOCK)
            for table in (last.table, group.table)
        ]
        found[-1] = GroupLayout(last.start, group.end, np.concatenate(tables), False, keys)
    return tuple(found)


def _own_tables(group: GroupLayout) -> bool:
    return not group.by_slot and group.table.shape[0] == group.end - group.start


def in_lanes(group: GroupLayout) -> GroupLayout:
    """A group whose rows that share keys are one problem: read once, and enough queries at once to keep a GPU's units busy.

    A power of two of lanes, so that steps with a few draft tokens more or less are alike (`graphs`).
    """
    rows = group.end - group.start
    if rows == 1 or group.by_slot:
        return group
    if group.table.shape[0] == 1:
        return replace(group, lanes=np.arange(rows)[None], lane_of=np.arange(rows))
    begins = np.concatenate(([True], (group.table[1:] != group.table[:-1]).any(axis=1)))
    first = np.flatnonzero(begins)
    counts = np.diff(np.append(first, rows))
    width = 1 << int(counts.max() - 1).bit_length()
    if width == 1:
        return group
    lanes = first[:, None] + np.minimum(np.arange(width), counts[:, None] - 1)
    problem = np.cumsum(begins) - 1
    return replace(group, table=group.table[first], lanes=lanes, lane_of=problem * width + np.arange(rows) - first[problem])


def round_up(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: two per power of two."""
    power = 1 << max(0, count - 1).bit_length()
    return power if count > power * 3 // 4 or power < 4 else power * 3 // 4


def rounded(layout: StepLayout) -> StepLayout:
    """A step of decoding sequences padded so that few shapes come up (`graphs`): numbers of rows, of problems and of blocks are
    rounded up. Added rows repeat the last one and write to the scratch block; added problems repeat the last one."""
    group = layout.groups[0]
    if len(layout.groups) > 1 or group.by_slot or (group.table.shape[0] == 1 and group.end > _LONGEST_DRAFT_ROWS):
        return layout
    num_rows, num_problems = len(layout.token_ids), group.table.shape[0]
    rows, problems, width = round_up(num_rows), round_up(num_problems), round_up(group.table.shape[1])
    keys_per_entry = group.num_keys // group.table.shape[1]
    lanes = lane_of = None
    if group.lanes is None or group.lane_of is None:
        problems = rows  # each row is one
    else:
        num_lanes = group.lanes.shape[1]
        more = np.repeat(group.lanes[:, -1:], round_up(num_lanes) - num_lanes, axis=1)
        lanes = _repeat_last(np.concatenate((group.lanes, more), axis=1), problems)
        problem, lane = np.divmod(group.lane_of, num_lanes)
        lane_of = _repeat_last(problem * lanes.shape[1] + lane, rows)
    table = np.pad(group.table, ((0, 0), (0, width - group.table.shape[1])), constant_values=SCRATCH_BLOCK)
    return StepLayout(
        token_ids=_repeat_last(layout.token_ids, rows),
        positions=_repeat_last(layout.positions, rows),
        slots=np.concatenate((layout.slots, np.full(rows - num_rows, SCRATCH_BLOCK * keys_per_entry))),
        groups=(GroupLayout(0, rows, _repeat_last(table, problems), False, width * keys_per_entry, lanes, lane_of),),
    )


def _repeat_last(values: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate((values, np.repeat(values[-1:], count - len(values), axis=0)))


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
            if scheduled.draft.trunk < len(scheduled.draft):
                self._add_branches(entry)
        self._pad()
        return StepLayout(
            token_ids=np.array(self._token_ids, dtype=np.int64),
            positions=np.array(self._positions, dtype=np.int64),
            slots=np.array(self._slots, dtype=np.int64),
            groups=tuple(self._groups),
        )

    def _runs(self) -> list[_Run]:
        """Known tokens and the trunks of drafts, cut where the padded length changes."""
        runs = []
        for entry, scheduled in enumerate(self._entries):
            first = scheduled.sequence.computed_tokens
            end = first + scheduled.num_tokens + scheduled.draft.trunk
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
        """Draft nodes beside the trunk: each sees the sequence and its own ancestors, in the order of positions.

        Node i waits in the slot of position `known + i`, wherever it stands in the tree; those of the trunk are at home there.
        """
        scheduled = self._entries[entry]
        sequence, draft = scheduled.sequence, scheduled.draft
        known, depths = len(sequence.token_ids), draft.depths()
        blocks = np.array(sequence.block_ids, dtype=np.int64) * self._block_tokens
        slots = (blocks[:, None] + np.arange(self._block_tokens)).reshape(-1)
        by_keys: dict[int, list[int]] = {}
        for node in range(draft.trunk, len(draft)):
            position = known + depths[node] - 1
            by_keys.setdefault(padded_blocks(position, block_tokens=self._block_tokens) * self._block_tokens, []).append(node)
        for num_keys, nodes in sorted(by_keys.items()):
            start = len(self._token_ids)
            table = np.full((len(nodes), num_keys), SCRATCH_BLOCK * self._block_tokens, dtype=np.int64)
            table[:, :known] = slots[:known]
            for row, node in zip(table, nodes, strict=True):
                depth = depths[node]
                row[known : known + depth] = slots[[known + ancestor for ancestor in draft.path(node)]]
                self._sampled[entry][node + 1] = len(self._token_ids)
                self._token_ids.append(draft.token_ids[node])
                self._positions.append(known + depth - 1)
                self._slots.append(int(slots[known + node]))
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
