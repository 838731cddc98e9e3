"""Between clients' calls and replicas: every position of every sequence once and in order, whatever happens to machines.

The relay dispatches each sequence to a replica under a fencing epoch, keeps the transcript of what came back, and when the
owner is lost, or lets go, finds the next one and goes on from the longest prefix that transcript and store know. Deltas may
come twice, late, or from an owner that is no longer one; only what extends the transcript passes. Nothing above this file
knows that replicas can die; nothing here knows text.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec

from spotserve.checkpoint.store import Store
from spotserve.config import GatewaySettings
from spotserve.core.clock import Clock
from spotserve.core.cluster import ReplicaState, RequestState
from spotserve.core.errors import ChannelClosed, Overloaded, StoreError
from spotserve.core.messages import (
    Cancel,
    Claim,
    ClaimAnswered,
    Deltas,
    GatewayReport,
    Moved,
    Released,
    RoutingTable,
    SequenceResumed,
    Served,
    Submit,
    WorkerReply,
)
from spotserve.core.model import ModelSpec
from spotserve.core.request import FinishReason, TokenDelta
from spotserve.gateway.calls import Call
from spotserve.gateway.links import ReplicaLinks
from spotserve.gateway.transcript import Transcript
from spotserve.metrics import Metrics
from spotserve.router import pick

CLAIM_TIMEOUT_S = 1.0
"""How long workers have to say whether they run a sequence that this gateway has only read of in the store."""

LINKS_TIMEOUT_S = 2.0
"""How long a gateway that has just started waits for its first worker before it takes a stored call over."""

RETRY_RELEASED_S = 0.1
"""Pause before a replica that let go of a sequence is asked again, when there is no other."""

SERVED_PER_REPORT = 64
"""Sizes of answered sequences that one report tells of: enough to learn a distribution, never a burden."""

KEEP_DELIVERED_S = 10.0
"""How long a delivered answer stays in memory."""

log = logging.getLogger(__name__)


class Relay:
    """Owner of every call that this gateway has accepted."""

    def __init__(
        self,
        gateway_id: str,
        settings: GatewaySettings,
        store: Store,
        *,
        secret: str,
        clock: Clock,
        metrics: Metrics,
        on_resumed: Callable[[SequenceResumed], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._on_resumed = on_resumed
        self._table = RoutingTable(version=0, replicas=(), model=None)
        self._links = ReplicaLinks(gateway_id, secret=secret, on_reply=self._on_reply, on_open=self._on_open, on_lost=self._on_lost)
        self._calls: dict[str, Call] = {}
        self._transcripts: dict[str, Transcript] = {}
        self._claims: dict[str, _Claiming] = {}
        self._take_overs: dict[str, asyncio.Task[Call | None]] = {}
        self._held: set[str] = set()
        """Sequences whose progress is being looked for: they are dispatched when it is known."""
        self._strangers: dict[str, asyncio.TimerHandle] = {}
        """Sequences of an earlier gateway of this name that workers still run, and when they are given up."""
        self._readers: Counter[str] = Counter()
        """Connections that read each call's answer."""
        self._unread: dict[str, asyncio.TimerHandle] = {}
        """Calls that nobody reads now, and when they are forgotten."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_filling = False
        self._finished = 0
        self._lost = 0
        self._arrived = 0
        self._served: deque[Served] = deque(maxlen=SERVED_PER_REPORT)

    # ------------------------------------------------------------------ what the routes need

    @property
    def model(self) -> ModelSpec | None:
        """The model that is served; None until a replica has loaded it."""
        return self._table.model

    @property
    def ready(self) -> bool:
        """Whether some replica serves."""
        return pick(self._table.replicas, {}) is not None

    async def submit(self, call: Call) -> tuple["_Stream", ...]:
        """Starts every sequence of a call.

        Raises:
            Overloaded: too many sequences wait already.
        """
        unfinished = sum(not transcript.is_finished for transcript in self._transcripts.values())
        capacity = sum(route.max_batch for route in self._table.replicas if route.state is ReplicaState.SERVING)
        if unfinished + len(call.requests) > capacity + self._settings.max_queued:
            raise Overloaded(f"{unfinished - capacity} sequences wait for a place already", retry_after_s=1.0)
        self._start_task(self._keep_record(call))
        self._calls[call.call_id] = call
        self._arrived += len(call.requests)
        for request in call.requests:
            self._transcripts[request.request_id] = Transcript(request)
        for request in call.requests:
            self._dispatch(self._transcripts[request.request_id])
        self._start_reading(call.call_id)
        return self._streams(call)

    async def reattach(self, call_id: str) -> tuple[Call, tuple["_Stream", ...]] | None:
        """A call of this gateway or, by way of the store, of one that is gone; None when nobody knows it.

        Raises:
            StoreError: it is not one of this gateway's and the store is out of reach.
        """
        self._start_reading(call_id)
        call = self._calls.get(call_id)
        try:
            if call is None:  # the task ends well even when this reader leaves meanwhile
                call = await asyncio.shield(self._taking_over(call_id))
        finally:
            if call is None:
                self.detach(call_id)
        return (call, self._streams(call)) if call is not None else None

    def cancel(self, request_id: str) -> None:
        """No more tokens of this sequence are wanted."""
        transcript = self._transcripts.get(request_id)
        if transcript is None or transcript.is_finished:
            return
        self._tell_owner(transcript, Cancel(request_id=request_id, epoch=transcript.epoch))
        transcript.finish_early(FinishReason.CANCELLED)
        self._note_finished(transcript)

    def withdraw(self, call_id: str) -> None:
        """The caller does not want the call any more: it is cancelled, and the store forgets it."""
        request_ids = [request.request_id for request in self._calls[call_id].requests]
        for request_id in request_ids:
            self.cancel(request_id)
        self._start_task(self._forget_record(call_id, request_ids))

    def detach(self, call_id: str) -> None:
        """The client left: when no other connection reads the call, it is cancelled after a grace, unless the client comes back."""
        self._stop_reading(call_id, self._settings.detach_grace_s)

    def release(self, call_id: str) -> None:
        """The answer was delivered in full. It is kept for a moment, because its last bytes may never have reached the client."""
        self._stop_reading(call_id, KEEP_DELIVERED_S)

    # ------------------------------------------------------------------ what the controller says

    def use_table(self, table: RoutingTable) -> None:
        """Follows a new routing table: connects to new replicas, lets go of vanished ones, dispatches what waits."""
        self._table = table
        self._links.follow(table.replicas)
        self._dispatch_waiting()

    def report(self, gateway_id: str) -> GatewayReport:
        """Sequences by state, and what came and went since this was last asked."""
        arrived, self._arrived = self._arrived, 0
        served, self._served = tuple(self._served), deque(maxlen=SERVED_PER_REPORT)
        count = dict.fromkeys(RequestState, 0)
        for transcript in self._transcripts.values():
            count[transcript.state] += 1
        return GatewayReport(
            gateway_id=gateway_id,
            queued=count[RequestState.QUEUED],
            running=count[RequestState.RUNNING],
            suspended=count[RequestState.SUSPENDED],
            finished=self._finished,
            lost=self._lost,
            arrived=arrived,
            served=served,
        )

    async def close(self) -> None:
        """Hangs up on all workers; they go on, for a gateway that comes back."""
        for timer in (*self._unread.values(), *self._strangers.values()):
            timer.cancel()
        tasks = (*self._tasks, *self._take_overs.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._links.close()

    # ------------------------------------------------------------------ dispatching

    def _dispatch(self, transcript: Transcript, *, prefer: str | None = None, exclude: frozenset[str] = frozenset()) -> None:
        """Gives a sequence to a replica; it waits when none serves, or all are full. One that was interrupted does not wait for
        those: its client is in the middle of an answer, and its next owner puts it in front."""
        may_wait = transcript.interruption is not None
        routes = self._links.connected(self._table.replicas)
        route = pick(routes, self._load(), exclude=exclude, prefer=prefer, may_wait=may_wait)
        if route is None:
            return
        if transcript.interruption is not None:
            self._note_resumed(transcript, transcript.interruption)
        transcript.dispatched_to(route.replica_id)
        submit = Submit(
            request=transcript.request,
            epoch=transcript.epoch,
            emitted_token_ids=tuple(transcript.token_ids),
        )
        try:
            self._links.send(route.replica_id, submit)
        except ChannelClosed:
            log.debug("%s is closing: what it owns is on the way to `_on_lost`", route.replica_id)

    def _dispatch_waiting(self) -> None:
        """In the order in which they came, until one finds no place; interrupted ones are not held up by it."""
        is_full = False
        for transcript in tuple(self._transcripts.values()):
            if transcript.is_waiting and transcript.request_id not in self._held and (transcript.interruption or not is_full):
                self._dispatch(transcript)
                is_full = is_full or transcript.is_waiting

    def _fill(self) -> None:
        """Sequences have ended: others may have their places."""
        self._is_filling = False
        self._dispatch_waiting()

    def _load(self) -> dict[str, int]:
        load: dict[str, int] = {}
        for transcript in self._transcripts.values():
            if transcript.owner is not None and not transcript.is_finished:
                load[transcript.owner] = load.get(transcript.owner, 0) + 1
        return load

    def _tell_owner(self, transcript: Transcript, message: Cancel) -> None:
        if transcript.owner is not None:
            self._tell(transcript.owner, message)

    def _tell(self, replica_id: str, message: Cancel | Claim) -> None:
        try:
            self._links.send(replica_id, message)
        except ChannelClosed:
            log.debug("%s is gone: it need not hear %s", replica_id, type(message).__name__)

    # ------------------------------------------------------------------ what workers say

    def _on_open(self, replica_id: str) -> None:
        log.debug("connected to %s", replica_id)
        self._dispatch_waiting()

    def _on_reply(self, replica_id: str, reply: WorkerReply) -> None:
        match reply:
            case Deltas():
                for delta in reply.deltas:
                    self._on_delta(replica_id, delta)
            case Moved():
                self._on_moved(reply)
            case Released():
                self._on_released(replica_id, reply)
            case ClaimAnswered():
                if not reply.found:
                    self._note_claim(reply.request_id, replica_id)

    def _on_delta(self, replica_id: str, delta: TokenDelta) -> None:
        transcript = self._transcripts.get(delta.request_id)
        if transcript is None:
            if delta.finish_reason is None:
                self._note_stranger(replica_id, delta)
            return
        if transcript.is_finished or delta.epoch < transcript.epoch:
            if delta.finish_reason is None:
                self._tell(replica_id, Cancel(request_id=delta.request_id, epoch=delta.epoch))
            self._note_claim(delta.request_id, replica_id)
            return
        if delta.epoch > transcript.epoch or transcript.owner != replica_id:
            transcript.owned_by(replica_id, delta.epoch)
        self._metrics.tokens_recomputed.inc(delta.recomputed_tokens)
        self._metrics.prefix_cached_tokens.inc(delta.cached_tokens)
        if not transcript.token_ids and delta.token_ids:
            self._metrics.time_to_first_token.observe(self._clock.now_s() - transcript.request.arrival_s)
        new = transcript.extend(delta)
        if new is not None:
            self._metrics.output_tokens.inc(len(new.token_ids))
            if new.draft_tokens:
                self._metrics.count_draft(new.drafter, drafted=new.draft_tokens, accepted=new.accepted_tokens)
        if transcript.finish_reason is not None:
            self._note_finished(transcript)
        self._note_claim(delta.request_id, replica_id)

    def _note_stranger(self, replica_id: str, delta: TokenDelta) -> None:
        """A sequence that this gateway does not know runs for it: its client may still come back, but not for ever."""
        if delta.request_id not in self._strangers:
            cancel = Cancel(request_id=delta.request_id, epoch=delta.epoch)
            give_up = asyncio.get_running_loop().call_later(
                self._settings.detach_grace_s, self._cancel_stranger, replica_id, cancel
            )
            self._strangers[delta.request_id] = give_up

    def _cancel_stranger(self, replica_id: str, cancel: Cancel) -> None:
        del self._strangers[cancel.request_id]
        if cancel.request_id not in self._transcripts:
            self._tell(replica_id, cancel)

    def _note_claim(self, request_id: str, replica_id: str) -> None:
        claiming = self._claims.get(request_id)
        if claiming is not None:
            claiming.answered_by(replica_id, found=not self._transcripts[request_id].is_waiting)

    def _on_moved(self, moved: Moved) -> None:
        transcript = self._transcripts.get(moved.request_id)
        if transcript is None or transcript.is_finished or moved.epoch <= transcript.epoch:
            return
        transcript.owned_by(moved.destination_replica_id, moved.epoch)
        if moved.destination_replica_id not in self._links.connected_ids():
            self._on_lost(moved.destination_replica_id)  # it may have died before the move was heard of: nobody would say so again

    def _on_released(self, replica_id: str, released: Released) -> None:
        transcript = self._transcripts.get(released.request_id)
        if transcript is None or transcript.is_finished or released.epoch < transcript.epoch:
            return
        transcript.suspend(released.reason)
        self._dispatch(transcript, prefer=released.destination_replica_id, exclude=frozenset({replica_id}))
        if transcript.is_waiting:
            asyncio.get_running_loop().call_later(RETRY_RELEASED_S, self._dispatch_waiting)

    def _on_lost(self, replica_id: str) -> None:
        """A replica's connection ended: everything it owned goes on elsewhere."""
        orphans = [
            transcript for transcript in self._transcripts.values() if transcript.owner == replica_id and not transcript.is_finished
        ]
        for transcript in orphans:
            transcript.suspend(f"{replica_id} was lost")
            self._held.add(transcript.request_id)
        for request_id in self._claims:
            self._note_claim(request_id, replica_id)
        if orphans:
            log.info("%s is lost; %d sequences resume elsewhere", replica_id, len(orphans))
            self._start_task(self._recover(orphans))

    async def _recover(self, orphans: list[Transcript]) -> None:
        """Goes on from the longest prefix that is known; the store may be a step ahead of what arrived here."""
        try:
            stored = await self._store.load([transcript.request_id for transcript in orphans])
        except StoreError as error:
            log.warning("resuming from transcripts alone: %s", error)
            stored = {}
        for transcript in orphans:
            self._held.discard(transcript.request_id)
            progress = stored.get(transcript.request_id)
            if progress is not None and transcript.is_waiting:
                transcript.extend_from_store(progress.token_ids, progress.finish_reason)
                if transcript.finish_reason is not None:
                    self._note_finished(transcript)
            if transcript.is_waiting:
                self._dispatch(transcript)

    # ------------------------------------------------------------------ calls of a gateway that is gone

    def _taking_over(self, call_id: str) -> "asyncio.Task[Call | None]":
        """The one task that takes this call over, however many readers come back to it at once."""
        task = self._take_overs.get(call_id)
        if task is None:
            task = asyncio.create_task(self._take_over(call_id), name=f"take over {call_id}")
            self._take_overs[call_id] = task
            task.add_done_callback(lambda _: self._take_overs.pop(call_id))
        return task

    async def _take_over(self, call_id: str) -> Call | None:
        """Makes a stored call this gateway's: from the worker that runs it, else from the store; None when nobody knows it."""
        record = await self._store.get_call(call_id)
        if record is None:
            return None
        call = msgspec.msgpack.decode(record, type=Call)
        request_ids = [request.request_id for request in call.requests]
        await self._links.wait_for_any(LINKS_TIMEOUT_S)
        stored = await self._store.load(request_ids)
        for request in call.requests:
            transcript = Transcript(request)
            progress = stored.get(request.request_id)
            transcript.suspend_unseen(progress.epoch if progress is not None else 0)
            if progress is not None:
                transcript.extend_from_store(progress.token_ids, progress.finish_reason)
            self._transcripts[request.request_id] = transcript
        self._held.update(request_ids)
        await self._claim([request_id for request_id in request_ids if self._transcripts[request_id].is_waiting])
        self._held.difference_update(request_ids)
        self._calls[call_id] = call
        if self._readers[call_id] == 0:
            self._start_reading(call_id)
            self.detach(call_id)
        self._dispatch_waiting()
        return call

    async def _claim(self, request_ids: list[str]) -> None:
        """Asks every worker for these sequences; returns when each has an owner or no worker has it."""
        claiming = {request_id: _Claiming(self._links.connected_ids()) for request_id in request_ids}
        self._claims.update(claiming)
        for replica_id in self._links.connected_ids():
            for request_id in request_ids:
                self._tell(replica_id, Claim(request_id=request_id))
        try:
            async with asyncio.timeout(CLAIM_TIMEOUT_S):
                await asyncio.gather(*(claim.settled for claim in claiming.values()))
        except TimeoutError:
            log.warning("not every worker said whether it runs %s", ", ".join(request_ids))
        for request_id in request_ids:
            del self._claims[request_id]

    async def _forget_record(self, call_id: str, request_ids: list[str]) -> None:
        try:
            await self._store.delete_call(call_id, request_ids)
        except StoreError as error:
            log.warning("%s stays in the store until its time is over: %s", call_id, error)

    async def _keep_record(self, call: Call) -> None:
        try:
            await self._store.put_call(call.call_id, msgspec.msgpack.encode(call))
        except StoreError as error:
            log.warning("%s cannot be re-attached after a restart: %s", call.call_id, error)

    # ------------------------------------------------------------------ inner

    def _streams(self, call: Call) -> tuple["_Stream", ...]:
        return tuple(_Stream(self._transcripts[request.request_id]) for request in call.requests)

    def _start_reading(self, call_id: str) -> None:
        self._readers[call_id] += 1
        timer = self._unread.pop(call_id, None)
        if timer is not None:
            timer.cancel()

    def _stop_reading(self, call_id: str, keep_s: float) -> None:
        self._readers[call_id] -= 1
        assert self._readers[call_id] >= 0, "a connection stopped reading twice"
        if self._readers[call_id] == 0:
            del self._readers[call_id]
            self._unread[call_id] = asyncio.get_running_loop().call_later(keep_s, self._forget, call_id)

    def _forget(self, call_id: str) -> None:
        """Nobody came back: what still runs is cancelled, and the memory of the call is dropped (the store keeps it longer)."""
        del self._unread[call_id]
        call = self._calls.pop(call_id, None)
        for request in call.requests if call is not None else ():
            self.cancel(request.request_id)
            del self._transcripts[request.request_id]

    def _note_resumed(self, transcript: Transcript, reason: str) -> None:
        log.info("%s resumes elsewhere: %s", transcript.request_id, reason)
        self._metrics.sequences_resumed.inc()
        self._on_resumed(SequenceResumed(request_id=transcript.request_id, reason=reason))

    def _note_finished(self, transcript: Transcript) -> None:
        self._finished += 1
        if not self._is_filling:
            self._is_filling = True
            asyncio.get_running_loop().call_soon(self._fill)
        self._metrics.sequence_seconds.observe(self._clock.now_s() - transcript.request.arrival_s)
        if transcript.finish_reason is FinishReason.FAILED:
            self._lost += 1
        elif transcript.token_ids:
            self._served.append(Served(len(transcript.request.prompt_token_ids), len(transcript.token_ids)))

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Claiming:
    """Waits for the answers to one `Claim`: a refusal, or the progress itself. Settled when one worker turned out to own the
    sequence or all have answered."""

    def __init__(self, replica_ids: list[str]) -> None:
        self._open = set(replica_ids)
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settle_if(not self._open)

    def answered_by(self, replica_id: str, *, found: bool) -> None:
        self._open.discard(replica_id)
        self._settle_if(found or not self._open)

    def _settle_if(self, settled: bool) -> None:
        if settled and not self.settled.done():
            self.settled.set_result(None)


class _Stream:
    """One reader of a transcript, from its beginning."""

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self._transcript.read()
