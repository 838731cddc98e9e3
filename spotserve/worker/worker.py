"""The heart of an instance: takes requests from gateways and peers, feeds the engine, and says what comes out.

Everything here runs on the event loop; the engine runs in its own thread and is reached through jobs. Nothing below knows
that commits, gateways or drains exist, and nothing here knows why the controller decides as it does.
"""

import asyncio
import logging
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

from spotserve.checkpoint.store import Commit, ProgressStore
from spotserve.config import WorkerSettings
from spotserve.core.clock import Clock
from spotserve.core.epoch import after_hand_over
from spotserve.core.errors import ChannelClosed, InvalidRequest, PeerLost
from spotserve.core.messages import (
    Cancel,
    Claim,
    ClaimAnswered,
    Deltas,
    HandOver,
    HandOverAnswered,
    Heartbeat,
    Moved,
    Released,
    SequenceReport,
    Submit,
    WorkerReply,
)
from spotserve.core.request import FinishReason, Request, TokenDelta
from spotserve.engine.results import FrozenSequence, StepResult
from spotserve.engine.serving import ServingEngine
from spotserve.speculation.acceptance import SequenceAcceptance
from spotserve.wire import Channel
from spotserve.worker.commits import Committer
from spotserve.worker.ownership import OwnedSequence, Ownership
from spotserve.worker.replicas import Fetcher, KvHome, LedReplica

SMOOTHING = 0.2
"""Weight of the newest step in the speeds that heartbeats report."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What a heartbeat needs of the engine, taken between two steps."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    sequences: tuple[SequenceReport, ...]

    def __add__(self, other: "EngineSnapshot") -> "EngineSnapshot":
        """Two engines of one worker."""
        return EngineSnapshot(
            self.running + other.running,
            self.waiting + other.waiting,
            self.kv_tokens_used + other.kv_tokens_used,
            self.kv_tokens_total + other.kv_tokens_total,
            (*self.sequences, *other.sequences),
        )


def _adopt(engine: ServingEngine, *, frozen: FrozenSequence, fetcher: Fetcher) -> bool:
    """Has an engine go on with a sequence whose KV was fetched; when it does not, that is not kept."""
    adopted = False
    try:
        adopted = engine.adopt(frozen)
    finally:
        if not adopted:
            fetcher.forget(frozen.request.request_id)
    return adopted


def _snapshot(engine: ServingEngine) -> EngineSnapshot:
    return EngineSnapshot(engine.num_running, engine.num_waiting, engine.kv_tokens_used, engine.kv_tokens_total, engine.reports())


class Worker:
    """Sequences, engine and gateways of one instance."""

    def __init__(self, instance_id: str, settings: WorkerSettings, store: ProgressStore, clock: Clock) -> None:
        self.instance_id = instance_id
        self._clock = clock
        self._gateways: dict[str, Channel[object]] = {}
        self._ownership = Ownership(keep_finished_s=settings.keep_finished_s)
        self._replicas: dict[str, LedReplica] = {}
        self._step_s = 0.0
        self._prefill_tokens_per_s = 0.0
        self.committer = Committer(
            store, interval_s=settings.commit_interval_s, on_fenced=self._fence, whole_progress=self._whole_progress
        )

    # ------------------------------------------------------------------ engine

    def lead(self, replica: LedReplica) -> None:
        """From now on this replica runs requests; of several the newest takes new ones."""
        self._replicas[replica.replica_id] = replica

    def leave(self, replica_id: str, reason: str) -> LedReplica | None:
        """A replica has ended; what still ran on it goes back to its gateways. None when it is not led here."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            for request in self.running_requests(replica_id):
                self.release(request.request_id, reason, replica.suggested_replica_id)
            replica.thread.stop()
            if replica.fetcher is not None:
                replica.fetcher.close()
        return replica

    def led(self, replica_id: str) -> LedReplica | None:
        """A replica that this worker leads."""
        return self._replicas.get(replica_id)

    def _taking(self) -> LedReplica | None:
        """The replica for what is new here."""
        return next((replica for replica in reversed(self._replicas.values()) if not replica.is_draining), None)

    def on_step(self, result: StepResult) -> None:
        """Says what one engine step made: to gateways at once, to the store behind their back."""
        self._measure(result)
        outgoing: defaultdict[str, list[TokenDelta]] = defaultdict(list)
        for output in result.outputs:
            sequence = self._ownership.get(output.request_id)
            delta = sequence.extend(output) if sequence is not None else None
            if sequence is None or delta is None:
                continue
            if delta.finish_reason is not None:
                sequence.finished_s = self._clock.now_s()
            outgoing[sequence.gateway_id].append(delta)
            self.committer.add(delta)
        for gateway_id, deltas in outgoing.items():
            self._tell(gateway_id, Deltas(deltas=tuple(deltas)))

    def _measure(self, result: StepResult) -> None:
        if result.num_prefill_tokens == 0:
            self._step_s += SMOOTHING * (result.step_s - self._step_s) if self._step_s else result.step_s
        elif result.step_s > 0:
            speed = result.num_prefill_tokens / result.step_s
            self._prefill_tokens_per_s += SMOOTHING * (speed - self._prefill_tokens_per_s) if self._prefill_tokens_per_s else speed

    async def heartbeat(self) -> Heartbeat:
        """Load and speed as of the end of the step that is under way."""
        self._ownership.forget_finished(self._clock.now_s())
        asked = [replica.thread.call(_snapshot) for replica in self._replicas.values()]
        snapshots = await asyncio.gather(*asked, return_exceptions=True)  # a replica may end before it answers
        snapshot = sum((taken for taken in snapshots if isinstance(taken, EngineSnapshot)), EngineSnapshot(0, 0, 0, 0, ()))
        return Heartbeat(
            instance_id=self.instance_id,
            running=snapshot.running,
            waiting=snapshot.waiting,
            kv_tokens_used=snapshot.kv_tokens_used,
            kv_tokens_total=snapshot.kv_tokens_total,
            step_s=self._step_s,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            store_healthy=self.committer.healthy,
            sequences=snapshot.sequences,
        )

    # ------------------------------------------------------------------ gateways

    def attach(self, gateway_id: str, channel: Channel[object]) -> None:
        """A gateway listens from now on; it is told all progress of its sequences."""
        self._gateways[gateway_id] = channel
        deltas = tuple(delta for sequence in self._ownership.of_gateway(gateway_id) for delta in sequence.whole_progress)
        if deltas:
            self._tell(gateway_id, Deltas(deltas=deltas))

    def detach(self, gateway_id: str, channel: Channel[object]) -> None:
        """A gateway's connection ended; its sequences go on, for a gateway that comes back."""
        if self._gateways.get(gateway_id) is channel:
            del self._gateways[gateway_id]

    def submit(self, gateway_id: str, submit: Submit) -> None:
        """Runs a request, or goes on with it when it is here already under an older epoch."""
        request_id = submit.request.request_id
        known = self._ownership.get(request_id)
        if known is not None and known.epoch > submit.epoch:
            return
        if known is not None:
            known.epoch, known.gateway_id = submit.epoch, gateway_id
            self._tell(gateway_id, Deltas(deltas=known.whole_progress))
            return
        replica = self._taking()
        if replica is None:
            draining = next(iter(self._replicas.values()), None)
            reason = "is draining" if draining is not None else "leads no replica yet"
            self._tell(
                gateway_id,
                Released(
                    request_id=request_id,
                    epoch=submit.epoch,
                    reason=f"{self.instance_id} {reason}",
                    destination_replica_id=draining.suggested_replica_id if draining is not None else None,
                ),
            )
            return
        sequence = OwnedSequence(
            request=submit.request,
            epoch=submit.epoch,
            gateway_id=gateway_id,
            replica_id=replica.replica_id,
            token_ids=list(submit.emitted_token_ids),
            start_position=len(submit.emitted_token_ids),
        )
        self._ownership.put(sequence)
        self._start(sequence)

    def claim(self, gateway_id: str, claim: Claim) -> None:
        """Another gateway (or a restarted one) asks for a sequence."""
        sequence = self._ownership.get(claim.request_id)
        self._tell(gateway_id, ClaimAnswered(request_id=claim.request_id, found=sequence is not None))
        if sequence is not None:
            sequence.gateway_id = gateway_id
            self._tell(gateway_id, Deltas(deltas=sequence.whole_progress))

    def cancel(self, cancel: Cancel) -> None:
        """Forgets a sequence, unless a newer owner's epoch protects it."""
        sequence = self._ownership.get(cancel.request_id)
        if sequence is not None and sequence.epoch <= cancel.epoch:
            self._forget(cancel.request_id)

    def _start(self, sequence: OwnedSequence) -> None:
        request, emitted = sequence.request, tuple(sequence.token_ids)
        started = self._replicas[sequence.replica_id].thread.call(lambda engine: engine.add(request, emitted_token_ids=emitted))
        started.add_done_callback(lambda future: self._started(sequence, future))

    def _started(self, sequence: OwnedSequence, future: asyncio.Future[None]) -> None:
        try:
            future.result()
        except InvalidRequest as error:
            self._fail(sequence, str(error))
        except PeerLost as error:
            log.info("%s was not started: %s", sequence.request.request_id, error)  # its replica ends, and releases it

    def _fail(self, sequence: OwnedSequence, reason: str) -> None:
        failed = TokenDelta(
            request_id=sequence.request.request_id,
            epoch=sequence.epoch,
            position=len(sequence.token_ids),
            token_ids=(),
            finish_reason=FinishReason.FAILED,
            error=reason,
        )
        if self._ownership.get(sequence.request.request_id) is sequence:
            self._ownership.drop(sequence.request.request_id)
            self._tell(sequence.gateway_id, Deltas(deltas=(failed,)))

    # ------------------------------------------------------------------ leaving

    def running_requests(self, replica_id: str) -> tuple[Request, ...]:
        """Requests of a replica that are not finished."""
        return tuple(sequence.request for sequence in self._ownership.running() if sequence.replica_id == replica_id)

    async def pack(self, request_id: str) -> HandOver | None:
        """Stops a sequence and says what a new owner has to know; None when it is not here, has finished, or cannot be moved.

        It is still this worker's: `ship` or `release` says what becomes of it.

        Raises:
            PeerLost: its replica has broken.
        """
        sequence = self._ownership.get(request_id)
        replica = self._replicas.get(sequence.replica_id) if sequence is not None else None
        if replica is None or replica.fetcher is None:
            return None
        frozen = await replica.thread.call(lambda engine: engine.freeze(request_id), settled=True)
        if frozen is None or sequence is None or self._ownership.get(request_id) is not sequence:
            return None
        return HandOver(
            gateway_id=sequence.gateway_id,
            request=frozen.request,
            epoch=sequence.epoch,
            progress=sequence.progress,
            emitted_token_ids=frozen.output_token_ids,
            computed_tokens=frozen.computed_tokens,
            replica_id=replica.replica_id,
            parallel=replica.home.parallel,
            holders=replica.home.holders,
            dtype=replica.home.dtype,
            learned={drafter: (known.accepted, known.expected) for drafter, known in frozen.learned.items()},
        )

    def ship(self, hand_over: HandOver, destination_replica_id: str) -> None:
        """The sequence has a new owner: forget it here and tell its gateway."""
        request_id = hand_over.request.request_id
        self.unfreeze(hand_over)
        sequence = self._ownership.get(request_id)
        if sequence is None:
            return
        if (sequence.epoch, sequence.gateway_id) != (hand_over.epoch, hand_over.gateway_id):
            # it was asked for anew while it was on its way, and the new owner does not know by whom
            self.release(request_id, "it moved while it was asked for anew", destination_replica_id)
            return
        self._ownership.drop(request_id)
        self._tell(
            sequence.gateway_id,
            Moved(request_id=request_id, epoch=after_hand_over(hand_over.epoch), destination_replica_id=destination_replica_id),
        )

    async def pass_on(self, hand_over: HandOver, destination_replica_id: str) -> HandOverAnswered:
        """Goes on with a packed sequence on another replica that this worker leads: the owner stays, its epoch grows."""
        request_id = hand_over.request.request_id
        sequence, replica = self._ownership.get(request_id), self._replicas.get(destination_replica_id)
        if sequence is None or replica is None or (sequence.epoch, sequence.gateway_id) != (hand_over.epoch, hand_over.gateway_id):
            return HandOverAnswered(request_id=request_id, accepted=False, reason="it, or where it was to go, has gone meanwhile")
        sequence.epoch, sequence.replica_id = after_hand_over(hand_over.epoch), destination_replica_id
        self._tell(
            sequence.gateway_id,
            Moved(request_id=request_id, epoch=sequence.epoch, destination_replica_id=destination_replica_id),
        )
        try:
            kv_bytes = await self._go_on(sequence, hand_over, replica)
        except InvalidRequest as error:
            return HandOverAnswered(request_id=request_id, accepted=False, reason=str(error))
        self.unfreeze(hand_over)
        return HandOverAnswered(request_id=request_id, accepted=True, kv_bytes=kv_bytes)

    def unfreeze(self, hand_over: HandOver) -> None:
        """The old replica of a packed sequence may forget it, KV and all."""
        replica = self._replicas.get(hand_over.replica_id)
        if replica is not None:
            replica.thread.post(lambda engine: engine.release(hand_over.request.request_id))

    def release(self, request_id: str, reason: str, destination_replica_id: str | None) -> None:
        """Gives a sequence back to its gateway, which resumes it from its tokens elsewhere."""
        sequence = self._ownership.get(request_id)
        if sequence is None or sequence.finish_reason is not None:
            return
        self._forget(request_id)
        self._tell(
            sequence.gateway_id,
            Released(request_id=request_id, epoch=sequence.epoch, reason=reason, destination_replica_id=destination_replica_id),
        )

    # ------------------------------------------------------------------ arriving

    async def adopt(self, hand_over: HandOver) -> HandOverAnswered:
        """Takes a peer's sequence over, with its KV when it can be fetched and there is room for it, else from its tokens."""
        request_id = hand_over.request.request_id
        known = self._ownership.get(request_id)
        epoch = after_hand_over(hand_over.epoch)
        replica = self._taking()
        if replica is None:
            return HandOverAnswered(request_id=request_id, accepted=False, reason=f"{self.instance_id} takes nothing new")
        if known is not None and known.epoch >= epoch:
            return HandOverAnswered(request_id=request_id, accepted=False, reason="a newer owner is here")
        if known is not None:
            self._forget(request_id)
        progress = hand_over.progress
        sequence = OwnedSequence(
            request=hand_over.request,
            epoch=epoch,
            gateway_id=hand_over.gateway_id,
            replica_id=replica.replica_id,
            token_ids=list(hand_over.emitted_token_ids),
            start_position=progress.position if progress.logprobs is not None or progress.gaps is not None else 0,
            logprobs=list(progress.logprobs or ()),
            gaps=list(progress.gaps or ()),
        )
        self._ownership.put(sequence)
        try:
            kv_bytes = await self._go_on(sequence, hand_over, replica)
        except InvalidRequest as error:
            if self._ownership.get(request_id) is sequence:
                self._ownership.drop(request_id)
            return HandOverAnswered(request_id=request_id, accepted=False, reason=str(error))
        if self._ownership.get(request_id) is not sequence:
            return HandOverAnswered(request_id=request_id, accepted=False, reason="it was withdrawn on arrival")
        self._tell(sequence.gateway_id, Deltas(deltas=sequence.whole_progress))
        return HandOverAnswered(request_id=request_id, accepted=True, kv_bytes=kv_bytes)

    async def _go_on(self, sequence: OwnedSequence, hand_over: HandOver, replica: LedReplica) -> int:
        """Has a replica compute a sequence further; bytes of KV that came for it from other devices.

        Raises:
            InvalidRequest: it is none that this model can go on with.
        """
        frozen = FrozenSequence(
            request=hand_over.request,
            output_token_ids=hand_over.emitted_token_ids,
            computed_tokens=hand_over.computed_tokens,
            learned={drafter: SequenceAcceptance(*counts) for drafter, counts in hand_over.learned.items()},
        )
        home = KvHome(hand_over.parallel, hand_over.holders, hand_over.dtype)
        kv_bytes = 0
        adopted = False
        if replica.fetcher is not None:
            try:
                kv_bytes = await self._fetch(sequence, frozen, home, replica.fetcher)
                adopted = await replica.thread.call(partial(_adopt, frozen=frozen, fetcher=replica.fetcher))
            except PeerLost as error:
                log.info("the KV of %s is not to be had: %s", sequence.request.request_id, error)
        if not adopted and self._ownership.get(sequence.request.request_id) is sequence:
            self._start(sequence)
        return kv_bytes

    async def _fetch(self, sequence: OwnedSequence, frozen: FrozenSequence, home: KvHome, fetcher: Fetcher) -> int:
        """Has the ranks get a sequence's KV; bytes of it that came from other devices. Nothing is kept there when it fails.

        Raises:
            PeerLost: somebody is gone, or the sequence was withdrawn meanwhile.
        """
        is_wanted = False
        try:
            kv_bytes = await asyncio.wrap_future(fetcher.fetch(frozen, home))
            is_wanted = self._ownership.get(sequence.request.request_id) is sequence
        finally:
            if not is_wanted:
                fetcher.forget(sequence.request.request_id)
        if not is_wanted:
            raise PeerLost("it was withdrawn")
        return kv_bytes

    # ------------------------------------------------------------------ inner

    def _forget(self, request_id: str) -> None:
        sequence = self._ownership.drop(request_id)
        replica = self._replicas.get(sequence.replica_id) if sequence is not None else None
        if replica is not None:
            replica.thread.post(lambda engine: engine.cancel(request_id))

    def _fence(self, request_id: str, epoch: int) -> None:
        sequence = self._ownership.get(request_id)
        if sequence is not None and sequence.epoch <= epoch:
            log.info("%s has a newer owner elsewhere; dropped here", request_id)
            self._forget(request_id)

    def _whole_progress(self, request_id: str) -> Commit | None:
        sequence = self._ownership.get(request_id)
        if sequence is None:
            return None
        return Commit(
            request_id=request_id,
            epoch=sequence.epoch,
            position=0,
            token_ids=tuple(sequence.token_ids),
            finish_reason=sequence.finish_reason,
        )

    def _tell(self, gateway_id: str, message: WorkerReply) -> None:
        channel = self._gateways.get(gateway_id)
        if channel is None:
            return  # it will be told everything when it attaches
        try:
            channel.send(message)
        except ChannelClosed:
            self.detach(gateway_id, channel)
