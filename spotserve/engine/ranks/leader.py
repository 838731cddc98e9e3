"""All ranks of a replica, as the engine that schedules for them sees them: steps go in, tokens come out in the same order."""

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from spotserve.core.errors import PeerLost
from spotserve.engine.batch import GroupLayout, StepLayout
from spotserve.engine.ranks.group import Group, to_bytes
from spotserve.engine.ranks.messages import (
    Compute,
    DropKv,
    GroupData,
    HoldKv,
    Leave,
    MoveSlots,
    Order,
    PlaceKv,
    SamplingData,
)
from spotserve.engine.ranks.rank import Rank
from spotserve.engine.sampler import SampledToken, SamplingRow


class Ranks(Protocol):
    """P x M ranks that obey one leader."""

    @property
    def num_stages(self) -> int:
        """P: so many steps can be under way at once without one waiting for another."""
        ...

    def issue(self, layout: StepLayout, logit_rows: Sequence[int], sampling: Sequence[SamplingRow] | None) -> None:
        """Starts a step. `sampling` is None when all of `logit_rows` are plainly greedy.

        Raises:
            PeerLost: a rank is gone.
        """
        ...

    def collect(self) -> list[SampledToken]:
        """Waits for the oldest step that was not collected: a token for each of its `logit_rows`.

        Raises:
            PeerLost: a rank is gone.
        """
        ...

    def move_slots(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies KV between slots, after the steps that were issued."""
        ...

    def hold_kv(self, key: str, slots: Sequence[int]) -> None:
        """Every rank gives its part of the KV in `slots` to whoever asks for `key`."""
        ...

    def drop_kv(self, key: str) -> None:
        """No longer."""
        ...

    def place_kv(self, key: str, slots: Sequence[int]) -> None:
        """Every rank writes its part of the KV that it fetched as `key` to `slots`."""
        ...

    def close(self) -> None:
        """The replica has ended."""
        ...


class SingleRank:
    """A replica of one rank: no link, no copy."""

    num_stages = 1

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._sampled: deque[list[SampledToken]] = deque()

    def issue(self, layout: StepLayout, logit_rows: Sequence[int], sampling: Sequence[SamplingRow] | None) -> None:
        """See `Ranks.issue`."""
        self._sampled.append(self._rank.compute(layout, logit_rows, sampling))

    def collect(self) -> list[SampledToken]:
        """See `Ranks.collect`."""
        return self._sampled.popleft()

    def move_slots(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """See `Ranks.move_slots`."""
        self._rank.move_slots(sources, destinations)

    def hold_kv(self, key: str, slots: Sequence[int]) -> None:
        """See `Ranks.hold_kv`."""
        self._rank.hold_kv(key, slots)

    def drop_kv(self, key: str) -> None:
        """See `Ranks.drop_kv`."""
        self._rank.drop_kv(key)

    def place_kv(self, key: str, slots: Sequence[int]) -> None:
        """See `Ranks.place_kv`."""
        self._rank.place_kv(key, slots)

    def close(self) -> None:
        """Nobody to tell."""


class LinkedRanks:
    """Ranks behind links, and the one in the leader's own process, if there is one, which is called directly."""

    def __init__(self, rank: Rank | None, group: Group) -> None:
        self._rank = rank
        self._group = group
        self.num_stages = group.plan.pipeline
        last = (group.plan.pipeline - 1, 0)
        self._results = group.orders.get(last)  # None: the leader's own rank samples
        self._sampled: deque[list[SampledToken]] = deque()

    def issue(self, layout: StepLayout, logit_rows: Sequence[int], sampling: Sequence[SamplingRow] | None) -> None:
        """See `Ranks.issue`. The others are told first, so that they lay out the step while the leader's rank computes."""
        samples = None if sampling is None else tuple(_sampling_data(row) for row in sampling)
        self._tell(
            Compute(
                token_ids=to_bytes(layout.token_ids),
                positions=to_bytes(layout.positions),
                slots=to_bytes(layout.slots),
                groups=tuple(_group_data(group) for group in layout.groups),
                logit_rows=to_bytes(np.array(logit_rows)),
                sampling=samples,
            )
        )
        if self._rank is not None:
            self._sampled.append(self._rank.compute(layout, logit_rows, sampling))

    def collect(self) -> list[SampledToken]:
        """See `Ranks.collect`."""
        own = self._sampled.popleft() if self._sampled else []
        if self._results is None:
            return own
        try:
            answer, _ = self._results.receive()
        except PeerLost as error:
            raise self._group.lost(error) from error
        return [SampledToken(token.token_id, token.logprob, token.gap) for token in answer.tokens]

    def move_slots(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """See `Ranks.move_slots`."""
        self._tell(MoveSlots(to_bytes(np.array(sources)), to_bytes(np.array(destinations))))
        if self._rank is not None:
            self._rank.move_slots(sources, destinations)

    def hold_kv(self, key: str, slots: Sequence[int]) -> None:
        """See `Ranks.hold_kv`."""
        self._tell(HoldKv(key, to_bytes(np.array(slots))))
        if self._rank is not None:
            self._rank.hold_kv(key, slots)

    def drop_kv(self, key: str) -> None:
        """See `Ranks.drop_kv`."""
        self._tell(DropKv(key))
        if self._rank is not None:
            self._rank.drop_kv(key)

    def place_kv(self, key: str, slots: Sequence[int]) -> None:
        """See `Ranks.place_kv`."""
        self._tell(PlaceKv(key, to_bytes(np.array(slots))))
        if self._rank is not None:
            self._rank.place_kv(key, slots)

    def close(self) -> None:
        """See `Ranks.close`."""
        with contextlib.suppress(PeerLost):  # whoever is gone need not be told
            if self._group.broken is None:
                self._tell(Leave())
        self._group.break_off("the replica has ended")

    def _tell(self, order: Order) -> None:
        try:
            for link in self._group.orders.values():
                link.send(order)
        except PeerLost as error:
            raise self._group.lost(error) from error


def _group_data(group: GroupLayout) -> GroupData:
    return GroupData(group.start, group.end, group.table.shape[0], group.by_slot, group.num_keys, to_bytes(group.table))


def _sampling_data(row: SamplingRow) -> SamplingData:
    """A row on the wire."""
    return SamplingData(
        row.sampling, row.position, tuple(row.prompt_token_ids), tuple(row.output_token_ids), tuple(row.banned_token_ids)
    )
