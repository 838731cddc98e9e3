"""What becomes of each sequence on a replica that goes away: finish here, move its KV, be computed again from its tokens, or both.

Generalises the just-in-time arrangement of SpotServe (Miao et al., ASPLOS'24, section 4.1) from one verdict on a batch to one
on each sequence: the feasible action under which its client waits least. With `usable = deadline - now - margin`:

    FINISH  waits 0                                             feasible if remaining_tokens * step <= usable
    MOVE    waits kv_bytes / link + uncomputed_tokens / prefill  feasible if sent + kv_bytes / link <= usable, and there is room
    RESUME  waits (queued + context_tokens) / prefill           always
    SPLIT   waits for the later of two parts (`split`), then as MOVE for what is not computed yet; where workers can do it

`sent` is the time for which the port is taken by moves before this one: one port sends one flow at a time, and a sequence
that waits for the port goes on decoding. `queued` are the tokens that its destination computes for earlier sequences of this
drain. Sequences with the most computed tokens choose first, because they have the most to lose.

When a replica is replaced while its machines stay, there is no deadline to weigh: its sequences are spread (`spread`).

Pure. Does not know how a verdict is carried out; every sequence gets exactly one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.core.messages import Address, SequenceAction, SequenceOrder, SequenceReport
from spotserve.core.model import ModelSpec
from spotserve.migration.split import Split, best_split

_MARGIN_S = 0.2
_MARGIN_SHARE = 0.1
"""Of the time to the deadline; estimates of the past are wrong by about this much (the paper's artifact takes 10 % as well)."""


@dataclass(frozen=True, slots=True)
class InstanceSpeed:
    """How fast an instance is; 0: not known."""

    step_s: float
    """One decode step of the whole batch."""
    prefill_tokens_per_s: float
    link_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Destination:
    """A replica that can take sequences over."""

    replica_id: str
    instance_id: str
    address: Address
    free_sequences: int
    """Sequences it can take and run at once; negative when some already wait there."""
    speed: InstanceSpeed
    context_tokens: int = 0
    """Of the sequences that it has."""


@dataclass(slots=True)
class _Share:
    """What this drain has given to a destination so far."""

    destination: Destination
    num_given: int = 0
    queued_tokens: int = 0

    @property
    def room(self) -> int:
        return self.destination.free_sequences - self.num_given

    def compute_s(self, tokens: int) -> float | None:
        """Until `tokens` are computed here, behind those that already wait; None: not known."""
        speed = self.destination.speed.prefill_tokens_per_s
        return (self.queued_tokens + tokens) / speed if speed > 0 else None


@dataclass(frozen=True, slots=True)
class _Transfer:
    num_bytes: int
    seconds: float


@dataclass(slots=True)
class _Drain:
    """One decision under way: what does not change, the port, and what destinations have been given."""

    model: ModelSpec
    source: InstanceSpeed
    left_s: float
    can_split: bool
    shares: list[_Share]
    sent_s: float = 0.0

    @property
    def usable_s(self) -> float:
        return self.left_s - margin_s(self.left_s)

    @property
    def deadline(self) -> str:
        return f"deadline in {_time(self.left_s)}"


def decide(
    sequences: Sequence[SequenceReport],
    *,
    now_s: float,
    deadline_s: float,
    source: InstanceSpeed,
    destinations: Sequence[Destination],
    model: ModelSpec,
    can_split: bool = False,
) -> tuple[SequenceOrder, ...]:
    """One order per sequence, in the order in which they are to be carried out: moves leave in this order.

    `destinations` must not contain the replica that goes away. Without destinations what cannot finish is to RESUME with no
    suggestion where. `can_split`: whether workers can carry out SPLIT.
    """
    shares = [_Share(destination) for destination in sorted(destinations, key=lambda each: each.replica_id)]
    drain = _Drain(model, source, deadline_s - now_s, can_split, shares)
    ordered = sorted(sequences, key=lambda each: (-each.computed_tokens, each.request_id))
    return tuple(_verdict(sequence, drain) for sequence in ordered)


def _verdict(sequence: SequenceReport, drain: _Drain) -> SequenceOrder:
    """The order for one sequence; notes in `drain` what it takes."""
    finish_s = sequence.remaining_tokens * drain.source.step_s
    if drain.source.step_s > 0 and finish_s <= drain.usable_s:
        reason = f"finish {sequence.remaining_tokens} tokens in {_time(finish_s)}; {drain.deadline}"
        return _order(sequence, SequenceAction.FINISH, None, reason)
    share = max(drain.shares, key=lambda each: each.room, default=None)
    if share is None:
        return _order(sequence, SequenceAction.RESUME, None, f"nowhere to go; {drain.deadline}")
    transfer = _transfer(sequence, drain.source, share.destination, drain.model)
    refusal = _refusal(sequence, transfer, share, sent_s=drain.sent_s, usable_s=drain.usable_s)
    recompute = _recompute(sequence, share)
    split = _split(sequence, transfer, share, drain) if drain.can_split else None
    share.num_given += 1
    if transfer is not None and split is not None:
        drain.sent_s += transfer.seconds * split.move_tokens / sequence.computed_tokens
        share.queued_tokens += sequence.context_tokens - split.move_tokens
        told = f"{split.recompute_tokens} tokens while {split.move_tokens} are sent in {_time(split.seconds)}"
        return _order(sequence, SequenceAction.SPLIT, share.destination, f"recompute {told}; {drain.deadline}", split)
    if transfer is not None and refusal is None:
        drain.sent_s += transfer.seconds
        share.queued_tokens += sequence.context_tokens - sequence.computed_tokens
        reason = f"move {_size(transfer.num_bytes)} in {_time(transfer.seconds)} < {recompute}; {drain.deadline}"
        return _order(sequence, SequenceAction.MOVE, share.destination, reason)
    share.queued_tokens += sequence.context_tokens
    return _order(sequence, SequenceAction.RESUME, share.destination, f"{recompute}: {refusal}; {drain.deadline}")


def spread(sequences: Sequence[SequenceReport], destinations: Sequence[Destination]) -> tuple[SequenceOrder, ...]:
    """One order per sequence of replicas whose place others take, longest context first: a step of a destination reads all of
    its KV, so contexts are divided as evenly as their room allows (longest processing time first: Graham, 1969).

    What has KV is moved, the rest is computed where it goes. Beyond the room of all destinations sequences are computed again
    where they will be next.
    """
    free = {each.replica_id: each.free_sequences for each in destinations}
    tokens = {each.replica_id: each.context_tokens for each in destinations}
    orders = []
    for sequence in sorted(sequences, key=lambda each: (-each.context_tokens, each.request_id)):
        chosen = min(
            destinations,
            key=lambda each: (free[each.replica_id] <= 0, tokens[each.replica_id], each.replica_id),
            default=None,
        )
        if chosen is None:
            orders.append(_order(sequence, SequenceAction.RESUME, None, "its replica is replaced: nowhere to go"))
            continue
        if sequence.computed_tokens == 0:
            action, reason = SequenceAction.RESUME, "no KV to move"
        elif free[chosen.replica_id] <= 0:
            action, reason = SequenceAction.RESUME, f"{chosen.replica_id} has no room for its KV"
        else:
            action, reason = SequenceAction.MOVE, f"move {sequence.computed_tokens} tokens of KV"
        free[chosen.replica_id] -= 1
        tokens[chosen.replica_id] += sequence.context_tokens
        orders.append(_order(sequence, action, chosen, f"its replica is replaced: {reason}"))
    return tuple(orders)


def fallback(destinations: Sequence[Destination], action: SequenceAction = SequenceAction.RESUME) -> SequenceOrder:
    """The verdict on sequences that nobody had reported when the others were decided: `action`, where there is most room."""
    freest = max(sorted(destinations, key=lambda each: each.replica_id), key=lambda each: each.free_sequences, default=None)
    return SequenceOrder(
        request_id="",
        action=SequenceAction.RESUME if freest is None else action,
        destination_replica_id=None if freest is None else freest.replica_id,
        destination=None if freest is None else freest.address,
        reason="not known when the drain was decided",
    )


def margin_s(left_s: float) -> float:
    """How long before a deadline that is `left_s` away everything has to be done, because estimates are wrong."""
    return max(_MARGIN_S, _MARGIN_SHARE * left_s)


def _transfer(sequence: SequenceReport, source: InstanceSpeed, destination: Destination, model: ModelSpec) -> _Transfer | None:
    """Sending the KV of `sequence`; None: there is none, or the speed of the link is not known."""
    link_bytes_per_s = min(source.link_bytes_per_s, destination.speed.link_bytes_per_s)
    if sequence.computed_tokens == 0 or link_bytes_per_s <= 0:
        return None
    num_bytes = sequence.computed_tokens * model.kv_bytes_per_token
    return _Transfer(num_bytes, num_bytes / link_bytes_per_s)


def _refusal(sequence: SequenceReport, transfer: _Transfer | None, share: _Share, *, sent_s: float, usable_s: float) -> str | None:
    """Why `sequence` is not moved; None: moving is feasible and its client waits less."""
    if transfer is None:
        return "no KV to move" if sequence.computed_tokens == 0 else "speed of the link not known"
    if share.room <= 0:
        return f"{share.destination.replica_id} has no room for its KV"
    if sent_s + transfer.seconds > usable_s:
        return f"moving {_size(transfer.num_bytes)} would end in {_time(sent_s + transfer.seconds)}"
    resume_s = share.compute_s(sequence.context_tokens)
    rest_s = share.compute_s(sequence.context_tokens - sequence.computed_tokens)
    if resume_s is not None and rest_s is not None and transfer.seconds + rest_s >= resume_s:
        return f"moving {_size(transfer.num_bytes)} takes {_time(transfer.seconds)}"
    return None


def _split(sequence: SequenceReport, transfer: _Transfer | None, share: _Share, drain: _Drain) -> Split | None:
    """How the KV of `sequence` is divided into what is computed again and what is sent; None: not at all."""
    speed = share.destination.speed.prefill_tokens_per_s
    if transfer is None or share.room <= 0 or speed <= 0:
        return None
    split = best_split(
        sequence.computed_tokens,
        recompute_token_s=1 / speed,
        move_token_s=transfer.seconds / sequence.computed_tokens,
        wait_s=share.queued_tokens / speed,
        move_within_s=drain.usable_s - drain.sent_s,
    )
    return split if split.recompute_tokens > 0 and split.move_tokens > 0 else None


def _recompute(sequence: SequenceReport, share: _Share) -> str:
    seconds = share.compute_s(sequence.context_tokens)
    return f"recompute {sequence.context_tokens} tokens" + ("" if seconds is None else f" in {_time(seconds)}")


def _order(
    sequence: SequenceReport, action: SequenceAction, destination: Destination | None, reason: str, split: Split | None = None
) -> SequenceOrder:
    takes_kv = action in (SequenceAction.MOVE, SequenceAction.SPLIT)
    return SequenceOrder(
        request_id=sequence.request_id,
        action=action,
        destination_replica_id=None if destination is None else destination.replica_id,
        destination=destination.address if destination is not None and takes_kv else None,
        reason=reason,
        recompute_tokens=0 if split is None else split.recompute_tokens,
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if abs(seconds) < 1 else f"{seconds:.1f} s"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
