"""Everything that one rank can say to another. The first message on a link says what the link is for.

leader -> rank    Order         what to compute, in the order in which it is computed; `Sampled` comes back from the last stage
rank   -> rank    (bytes)       hidden states and partial sums: both ends know from the step what comes next
anyone -> rank    Read          weights and KV, on demand, beside the steps
leader -> rank    (pulse)       a byte now and then, so that a peer that hangs is told from one that computes
"""

from typing import TypeAlias

import msgspec

from spotserve.core.messages import Address
from spotserve.core.request import SamplingParams, TokenLogprob


class RankMessage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of every message between ranks."""


# --------------------------------------------------------------------------- what a link is for


class JoinOrders(RankMessage, frozen=True):
    """From the leader: orders of a group follow."""

    group_id: str


class JoinPulse(RankMessage, frozen=True):
    """From the leader: pulses of a group follow."""

    group_id: str


class JoinPeer(RankMessage, frozen=True):
    """From another rank of a group: hidden states or partial sums will pass."""

    group_id: str
    stage: int
    shard: int


class Reader(RankMessage, frozen=True):
    """Reads follow, each answered before the next."""


Hello: TypeAlias = JoinOrders | JoinPulse | JoinPeer | Reader

# --------------------------------------------------------------------------- orders


class GroupData(msgspec.Struct, frozen=True, array_like=True):
    """A `GroupLayout` on the wire."""

    start: int
    end: int
    table_rows: int
    by_slot: bool
    num_keys: int
    table: bytes


class SamplingData(msgspec.Struct, frozen=True, array_like=True):
    """A `SamplingRow` on the wire."""

    sampling: SamplingParams
    position: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]


class Compute(RankMessage, frozen=True):
    """One step. Arrays are of int64."""

    token_ids: bytes
    positions: bytes
    slots: bytes
    groups: tuple[GroupData, ...]
    logit_rows: bytes
    """Rows to choose a token for; empty: none."""
    sampling: tuple[SamplingData, ...] | None
    """One per row of `logit_rows`; None: all are plainly greedy."""


class MoveSlots(RankMessage, frozen=True):
    """Copy KV between slots: draft tokens were accepted."""

    sources: bytes
    destinations: bytes


class HoldKv(RankMessage, frozen=True):
    """Give the KV in these slots to whoever asks for it under `key`."""

    key: str
    slots: bytes


class DropKv(RankMessage, frozen=True):
    """Nobody will ask for `key` any more."""

    key: str


class PlaceKv(RankMessage, frozen=True):
    """Write the KV that was fetched under `key` to these slots."""

    key: str
    slots: bytes


class Leave(RankMessage, frozen=True):
    """The replica has ended."""


Order: TypeAlias = Compute | MoveSlots | HoldKv | DropKv | PlaceKv | Leave


class SampledData(msgspec.Struct, frozen=True, array_like=True):
    """A `SampledToken` on the wire."""

    token_id: int
    logprob: TokenLogprob | None = None
    gap: float | None = None


class Sampled(RankMessage, frozen=True):
    """From the last stage to the leader: one token per wanted row of the oldest step that has none yet."""

    tokens: tuple[SampledData, ...]


# --------------------------------------------------------------------------- reads


class Units(msgspec.Struct, frozen=True, array_like=True):
    """Numbers from `start` to before `stop`: of units, layers or heads."""

    start: int
    stop: int

    @property
    def numbers(self) -> range:
        """As a range."""
        return range(self.start, self.stop)


class ReadWeights(RankMessage, frozen=True):
    """As much of these parameters as is here: answered by `Offered`, with the tensors' bytes one after the other, per parameter
    and segment."""

    dtype: str
    names: tuple[str, ...]
    units: tuple[tuple[Units, ...], ...]
    """Per parameter, per segment; no segments: the whole parameter."""


class ReadKv(RankMessage, frozen=True):
    """KV held under `key`: layers and heads by their index in the model; answered by `Given` with [tokens, 2, heads, head_size]
    of each layer. Waits until the key is held."""

    key: str
    layers: Units
    heads: Units


class KvSource(msgspec.Struct, frozen=True, array_like=True):
    """A rank of the old owner, and what it has: layers and key-value heads by their index in the model."""

    rank: Address
    layers: Units
    heads: Units


class FetchKv(RankMessage, frozen=True):
    """To a rank of the new owner: get these layers and heads of a sequence's KV and keep them until they are placed."""

    key: str
    dtype: str
    num_tokens: int
    head_size: int
    layers: Units
    heads: Units
    sources: tuple[KvSource, ...]


class ForgetKv(RankMessage, frozen=True):
    """To a rank of the new owner: what was fetched under `key` will not be placed; answered by `Given` nothing."""

    key: str


class Given(RankMessage, frozen=True):
    """What was asked for is in the payload."""

    num_bytes: int


class Offered(RankMessage, frozen=True):
    """The units of each parameter that are in the payload, per segment; a parameter that is held whole and is here has one
    unit, one that is not here has none."""

    units: tuple[tuple[Units, ...], ...]


class Fetched(RankMessage, frozen=True):
    """The KV is here; `num_bytes` of it came from other devices."""

    num_bytes: int


class Refused(RankMessage, frozen=True):
    """What was asked for is not to be had."""

    reason: str


Read: TypeAlias = ReadWeights | ReadKv | FetchKv | ForgetKv
Answer: TypeAlias = Given | Offered | Fetched | Refused
