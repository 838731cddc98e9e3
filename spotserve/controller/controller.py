"""Joins deciding and acting: every event is handled, and its commands are on their way, before the next one is looked at."""

import asyncio

from spotserve.controller.executor import Executor
from spotserve.controller.state import ControllerState
from spotserve.core.clock import Clock
from spotserve.core.messages import (
    TERMINATED,
    ControllerInbound,
    Event,
    GatewayAttached,
    GatewayReport,
    InstanceLost,
    NoticeReceived,
    Registered,
    SequenceMoved,
    Tick,
)
from spotserve.metrics import Metrics
from spotserve.wire import Channel

IDLE_TICK_S = 0.5
"""How often time is looked at when no deadline is known."""


class Controller:
    """One controller: a state, an executor, and the channels that feed them."""

    def __init__(self, state: ControllerState, executor: Executor, *, clock: Clock, metrics: Metrics) -> None:
        self.state = state
        self._executor = executor
        self._clock = clock
        self._metrics = metrics
        self.gateway_reports: dict[str, GatewayReport] = {}

    def dispatch(self, event: Event) -> None:
        """Handles one event and sends what follows from it."""
        heard_s = self._clock.now_s()
        commands = self.state.handle(event, heard_s)
        self._executor.carry_out(commands)
        self._count(event, heard_s, acted=bool(commands))

    async def on_channel(self, channel: Channel[ControllerInbound]) -> None:
        """Serves one worker or gateway until it hangs up."""
        instance_id: str | None = None
        gateway_id: str | None = None
        try:
            while True:
                message = await channel.receive()
                match message:
                    case GatewayAttached():
                        gateway_id = message.gateway_id
                        self._executor.add_gateway(gateway_id, channel, self.state.routing_table())
                    case GatewayReport():
                        self.gateway_reports[message.gateway_id] = message
                        self.dispatch(message)
                    case Registered():
                        instance_id = message.instance_id
                        self._executor.add_worker(instance_id, channel)
                        self.dispatch(message)
                    case _:
                        self.dispatch(message)
        finally:
            if gateway_id is not None:
                self._executor.remove_gateway(gateway_id, channel)
                self.gateway_reports.pop(gateway_id, None)
            if instance_id is not None and self._executor.remove_worker(instance_id, channel):
                self.dispatch(InstanceLost(instance_id=instance_id, reason="its connection ended"))

    async def keep_time(self) -> None:
        """Tells the state that time has passed, when it asked to be told."""
        while True:
            due_s = self.state.next_deadline_s
            wait_s = IDLE_TICK_S if due_s is None else min(IDLE_TICK_S, max(0.01, due_s - self._clock.now_s()))
            await asyncio.sleep(wait_s)
            if due_s is not None and self._clock.now_s() >= due_s:
                self.dispatch(Tick())

    def _count(self, event: Event, heard_s: float, *, acted: bool) -> None:
        match event:
            case NoticeReceived() if acted:
                self._metrics.notices.labels(event.notice.source).inc()
                self._metrics.notice_to_published.observe(self._clock.now_s() - heard_s)
            case InstanceLost() if acted and event.reason != TERMINATED:
                instance = self.state.instances[event.instance_id]
                self._metrics.preemptions.labels("yes" if instance.notice is not None else "no").inc()
            case SequenceMoved():
                self._metrics.sequences_moved.inc()
                self._metrics.kv_bytes_moved.inc(event.kv_bytes)
