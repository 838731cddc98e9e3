"""The heart of an instance: takes requests from gateways and peers, feeds the engine, and says what comes out.

Everything here runs on the event loop; the engine runs in its own thread and is reached through jobs. Nothing below knows
that commits, gateways or drains exist, and nothing here knows why the controller decides as it does.
"""

import asyncio
import logging
from collections import defaultdict
from dataclasses import dataclass

from spotserve.checkpoint.store import Commit, ProgressStore
from spotserve.config import WorkerSettings
from spotserve.core.clock import Clock
from spotserve.core.epoch import after_hand_over
from spotserve.core.errors import ChannelClosed, InvalidRequest
from spotserve.core.messages import (
    Cancel,
    Claim,
    ClaimAnswered,
    Deltas,
    HandOverAnswered,
    Heartbeat,
    Moved,
    Released,
    SequenceReport,
    Submit,
    WorkerReply,
)
from spotserve.core.model import ModelSpec
from spotserve.core.request import FinishReason, Request, TokenDelta
from spotserve.engine.engine import Engine
from spotserve.engine.results import ExportedSequence, StepResult
from spotserve.wire import Channel
from spotserve.worker.commits import Committer
from spotserve.worker.engine_thread import EngineThread
from spotserve.worker.ownership import OwnedSequence, Ownership
from spotserve.worker.transfer import Parcel

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


def _snapshot(engine: Engine) -> EngineSnapshot:
    return EngineSnapshot(engine.num_running, engine.num_waiting, engine.kv_tokens_used, engine.kv_tokens_total, engine.reports())


class Worker:
    """Sequences, engine and gateways of one instance."""

    def __init__(self, instance_id: str, settings: WorkerSettings, store: ProgressStore, clock: Clock) -> None:
        self.instance_id = instance_id
        self._clock = clock
        self._gateways: dict[str, Channel[object]] = {}
        self._ownership = Ownership(keep_finished_s=settings.keep_finished_s)
        self._engine: EngineThread | None = None
        self._step_s = 0.0
        self._prefill_tokens_per_s = 0.0
        self.model: ModelSpec | None = None
        self.is_draining = False
        self.suggested_replica_id: str | None = None
        """Where the controller wants new requests of a draining replica to go."""
        self.committer = Committer(
            store, interval_s=settings.commit_interval_s, on_fenced=self._fence, whole_progress=self._whole_progress
        )

    # ------------------------------------------------------------------ engine

    def use_engine(self, engine: EngineThread, model: ModelSpec) -> None:
        """From now on requests are run."""
        self._engine, self.model = engine, model

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
        snapshot = EngineSnapshot(0, 0, 0, 0, ()) if self._engine is None else await self._engine.call(_snapshot)
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
        if self._engine is None or self.is_draining:
            reason = "is draining" if self.is_draining else "has no model yet"
            self._tell(gateway_id, self._released(request_id, submit.epoch, f"{self.instance_id} {reason}"))
            return
        sequence = OwnedSequence(
            request=submit.request,
            epoch=submit.epoch,
            gateway_id=gateway_id,
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
        assert self._engine is not None
        request, emitted = sequence.request, tuple(sequence.token_ids)
        started = self._engine.call(lambda engine: engine.add(request, emitted_token_ids=emitted))
        started.add_done_callback(lambda future: self._started(sequence, future))

    def _started(self, sequence: OwnedSequence, future: asyncio.Future[None]) -> None:
        try:
            future.result()
        except InvalidRequest as error:
            self._fail(sequence, str(error))

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

    def running_requests(self) -> tuple[Request, ...]:
        """Requests that are not finished."""
        return tuple(sequence.request for sequence in self._ownership.running())

    async def pack(self, request_id: str) -> Parcel | None:
        """Stops a sequence and packs it with its KV; None when it is not here or has finished.

        It is still this worker's: `ship` or `release` says what becomes of it.
        """
        assert self._engine is not None
        exported: ExportedSequence | None = await self._engine.call(lambda engine: engine.export_sequence(request_id))
        sequence = self._ownership.get(request_id)
        if exported is None or sequence is None or sequence.finish_reason is not None:
            return None
        return Parcel(gateway_id=sequence.gateway_id, epoch=sequence.epoch, progress=sequence.progress, exported=exported)

    def ship(self, parcel: Parcel, destination_replica_id: str) -> None:
        """The parcel has a new owner: forget it here and tell its gateway."""
        sequence = self._ownership.get(parcel.request_id)
        if sequence is None:
            return
        if (sequence.epoch, sequence.gateway_id) != (parcel.epoch, parcel.gateway_id):
            # it was asked for anew while it was on its way, and the new owner does not know by whom
            self.release(parcel.request_id, "it moved while it was asked for anew", destination_replica_id)
            return
        self._ownership.drop(parcel.request_id)
        self._tell(
            sequence.gateway_id,
            Moved(
                request_id=parcel.request_id,
                epoch=after_hand_over(parcel.epoch),
                destination_replica_id=destination_replica_id,
            ),
        )

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

    async def adopt(self, parcel: Parcel) -> HandOverAnswered:
        """Takes a peer's sequence over, with its KV when there is room for it, else from its tokens."""
        request_id = parcel.request_id
        known = self._ownership.get(request_id)
        epoch = after_hand_over(parcel.epoch)
        if self._engine is None or self.is_draining:
            return HandOverAnswered(request_id=request_id, accepted=False, reason=f"{self.instance_id} takes nothing new")
        if known is not None and known.epoch >= epoch:
            return HandOverAnswered(request_id=request_id, accepted=False, reason="a newer owner is here")
        if known is not None:
            self._forget(request_id)
        exported, progress = parcel.exported, parcel.progress
        sequence = OwnedSequence(
            request=exported.request,
            epoch=epoch,
            gateway_id=parcel.gateway_id,
            token_ids=list(exported.output_token_ids),
            start_position=progress.position if progress.logprobs is not None or progress.gaps is not None else 0,
            logprobs=list(progress.logprobs or ()),
            gaps=list(progress.gaps or ()),
        )
        self._ownership.put(sequence)
        try:
            imported = await self._engine.call(lambda engine: engine.import_sequence(exported))
        except InvalidRequest as error:
            if self._ownership.get(request_id) is sequence:
                self._ownership.drop(request_id)
            return HandOverAnswered(request_id=request_id, accepted=False, reason=str(error))
        if self._ownership.get(request_id) is not sequence:
            return HandOverAnswered(request_id=request_id, accepted=False, reason="it was withdrawn on arrival")
        if not imported:
            self._start(sequence)
        self._tell(sequence.gateway_id, Deltas(deltas=sequence.whole_progress))
        return HandOverAnswered(request_id=request_id, accepted=True)

    # ------------------------------------------------------------------ inner

    def _released(self, request_id: str, epoch: int, reason: str) -> Released:
        return Released(request_id=request_id, epoch=epoch, reason=reason, destination_replica_id=self.suggested_replica_id)

    def _forget(self, request_id: str) -> None:
        if self._ownership.drop(request_id) is not None and self._engine is not None:
            self._engine.post(lambda engine: engine.cancel(request_id))

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
