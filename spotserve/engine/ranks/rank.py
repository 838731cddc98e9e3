"""One slot of a replica: its layers, its cache, and its share of every step.

A rank is given steps in the order in which the leader issued them and finishes each before the next: that order is what makes
blocks safe to use again, whoever computes. A rank in the leader's own process is called directly; the others obey a link.
"""

from collections.abc import Sequence

import torch

from spotserve.core.errors import PeerLost
from spotserve.engine.attention import KvCache
from spotserve.engine.batch import GroupLayout, StepLayout
from spotserve.engine.cuts import StageSlice
from spotserve.engine.fused import FusedStage
from spotserve.engine.graphs import RecordedSteps
from spotserve.engine.ranks.group import Group, from_bytes, neighbours, receive_hidden, send_hidden
from spotserve.engine.ranks.memory import HeldKv, RankMemory
from spotserve.engine.ranks.messages import (
    Compute,
    DropKv,
    HoldKv,
    Leave,
    MoveSlots,
    Order,
    PlaceKv,
    Sampled,
    SampledData,
    SamplingData,
)
from spotserve.engine.sampler import SampledToken, Sampler, SamplingRow, greedy
from spotserve.engine.stage import Stage


class Rank:
    """Owner of a stage and its cache; used by one thread."""

    def __init__(
        self,
        stage: Stage,
        stage_slice: StageSlice,
        cache: KvCache,
        *,
        heads: range,
        hidden_size: int,
        vocabulary_size: int,
        memory: RankMemory,
        group: Group | None,
    ) -> None:
        """`heads`: key-value heads of the model that are on this shard; `group`: None when it is the only rank of its replica."""
        self._stage = stage
        self._slice = stage_slice
        self._heads = heads
        self._hidden_size = hidden_size
        self._vocabulary_size = vocabulary_size
        self._memory = memory
        self._group = group
        self.cache = cache
        self._samples = stage_slice.is_last and stage_slice.shard == 0
        self._sampler = Sampler(vocabulary_size=vocabulary_size, device=cache.device) if self._samples else None
        self._recorded = RecordedSteps(stage, cache) if group is None and _queues_all(stage, cache) else None
        self._previous, self._next = (None, None) if group is None else neighbours(group)

    def compute(self, layout: StepLayout, logit_rows: Sequence[int], sampling: Sequence[SamplingRow] | None) -> list[SampledToken]:
        """This rank's share of one step.

        Returns:
            a token for each of `logit_rows`, if this is the rank that samples; `sampling` is None when all are plainly greedy.

        Raises:
            PeerLost: another rank is gone.
        """
        with torch.inference_mode():
            logits = self.forward(layout, logit_rows)
        if logits is None or self._sampler is None or not logit_rows:
            return []
        with torch.inference_mode():
            return self._sample(logits, sampling)

    def forward(self, layout: StepLayout, logit_rows: Sequence[int]) -> torch.Tensor | None:
        """`compute` without the choice: logits [logit_rows, vocabulary], valid until the next call; None: a later stage has it."""
        if self._recorded is not None:
            return self._recorded.logits(layout, logit_rows)[:, : self._vocabulary_size]
        rows = layout.bind(self.cache, logit_rows)
        hidden = self._receive(rows.token_ids.shape[0])
        if not self._slice.is_last:
            self._send(self._stage(rows, hidden, None))
            return None
        # Runs even when nobody samples: prompts in the making need their keys all the same.
        return self._stage(rows, hidden, rows.logit_rows)[:, : self._vocabulary_size]

    def _sample(self, logits: torch.Tensor, sampling: Sequence[SamplingRow] | None) -> list[SampledToken]:
        assert self._sampler is not None
        if sampling is None:
            return [SampledToken(token_id) for token_id in greedy(logits)]
        return self._sampler.sample(logits, sampling)

    def move_slots(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies KV between slots."""
        with torch.inference_mode():
            self.cache.move(sources=sources, destinations=destinations)

    def hold_kv(self, key: str, slots: Sequence[int]) -> None:
        """Gives the KV in these slots to whoever asks for `key`."""
        self._memory.hold_kv(key, HeldKv(self.cache, slots, self._heads))

    def drop_kv(self, key: str) -> None:
        """No longer."""
        self._memory.drop_kv(key, self.cache)

    def place_kv(self, key: str, slots: Sequence[int]) -> None:
        """Writes what was fetched under `key` to these slots.

        Raises:
            PeerLost: it is not here.
        """
        layers = self._memory.take_fetched(key)
        if len(layers) != len(self._slice.layers):
            raise PeerLost(f"the KV of {key} was fetched for {len(layers)} layers, not for {len(self._slice.layers)}")
        whole = range(len(self._heads))
        with torch.inference_mode():
            for layer, values in zip(self._slice.layers, layers, strict=True):
                self.cache.write(layer, slots, whole, values)

    # ------------------------------------------------------------------ orders from the leader

    def serve(self) -> None:
        """Obeys the leader until it says that the replica has ended.

        Raises:
            PeerLost: a rank is gone.
        """
        assert self._group is not None
        orders = self._group.order_link
        assert orders is not None
        try:
            while True:
                order, _ = orders.receive()
                if isinstance(order, Leave):
                    self._group.break_off("the replica has ended")
                    return
                self._obey(order)
        except PeerLost as error:
            raise self._group.lost(error) from error
        finally:
            self._memory.drop_kv_of(self.cache)

    def _obey(self, order: Order) -> None:
        match order:
            case Compute():
                self._compute(order)
            case MoveSlots():
                self.move_slots(from_bytes(order.sources).tolist(), from_bytes(order.destinations).tolist())
            case HoldKv():
                self.hold_kv(order.key, from_bytes(order.slots).tolist())
            case DropKv():
                self.drop_kv(order.key)
            case PlaceKv():
                self.place_kv(order.key, from_bytes(order.slots).tolist())

    def _compute(self, order: Compute) -> None:
        logit_rows = from_bytes(order.logit_rows).tolist()
        sampling = None if order.sampling is None else [_sampling_row(data) for data in order.sampling]
        tokens = self.compute(_layout(order), logit_rows, sampling)
        if self._samples:
            assert self._group is not None
            assert self._group.order_link is not None
            self._group.order_link.send(Sampled(tuple(SampledData(token.token_id, token.logprob, token.gap) for token in tokens)))

    # ------------------------------------------------------------------ between stages

    def _receive(self, num_rows: int) -> torch.Tensor | None:
        if self._previous is None:
            return None
        try:
            return receive_hidden(self._previous, (num_rows, self._hidden_size), dtype=self.cache.dtype, device=self.cache.device)
        except PeerLost as error:
            assert self._group is not None
            raise self._group.lost(error) from error

    def _send(self, hidden: torch.Tensor) -> None:
        assert self._next is not None
        try:
            send_hidden(self._next, hidden)
        except PeerLost as error:
            assert self._group is not None
            raise self._group.lost(error) from error


def _queues_all(stage: Stage, cache: KvCache) -> bool:
    """Whether a step of this stage is GPU work alone, started without looking at any of it."""
    return cache.device.type == "cuda" and isinstance(stage, FusedStage)


def _layout(order: Compute) -> StepLayout:
    return StepLayout(
        token_ids=from_bytes(order.token_ids),
        positions=from_bytes(order.positions),
        slots=from_bytes(order.slots),
        groups=tuple(
            GroupLayout(
                group.start, group.end, from_bytes(group.table).reshape(group.table_rows, -1), group.by_slot, group.num_keys
            )
            for group in order.groups
        ),
    )


def _sampling_row(data: SamplingData) -> SamplingRow:
    return SamplingRow(data.sampling, data.position, data.prompt_token_ids, data.output_token_ids, data.banned_token_ids)
