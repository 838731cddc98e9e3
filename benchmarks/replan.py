"""How long the controller thinks when something happens to its fleet, from 16 to 10,000 instances: whole turns, as in production.

    python benchmarks/replan.py
    python benchmarks/replan.py --sizes 1000 --planning shape --json
    python benchmarks/replan.py --sizes 1000 --profile loss

Times are those of `ControllerState.handle` from the event to the commands: what stays and what is free, the search, weighing,
placing, choosing sources, scheduling, the routing table, the journal. A fleet of so many `--instance` serves, every leader with
`--sequences` sequences, and is asked for `--load` of what it can serve. Then, `--rounds` times and every time to other machines:
two losses without notice (the first leaves devices without use, the second has a replica to bring up), a notice that comes
true, three machines that join, `--at-once` that join together and are lost again, a look at the whole fleet when
nothing has happened for a while, and a heartbeat. Between two events all that was commanded is done.

What a replica makes of requests of these lengths is known after the first rounds, as it is where the user says what load to
expect; `--new-load` has it worked out at every event, as where the load is measured. The table has the median and the largest
processor time of one process, and the median of the wall. `--profile` prints where the time of one kind of event goes.
"""

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from spotserve.config import ControllerSettings
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.records import Instance, Replica
from spotserve.controller.rehearsal import answer_at_once
from spotserve.controller.state import ControllerState
from spotserve.core.cluster import DeviceId, InstanceState, Notice, ReplicaState
from spotserve.core.hardware import InstanceType
from spotserve.core.messages import (
    Activate,
    Address,
    Command,
    Event,
    Heartbeat,
    HeldSlot,
    InstanceLaunched,
    InstanceLost,
    NoticeReceived,
    Registered,
    SequenceReport,
    Tick,
)
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, ReplicaPlan
from spotserve.planner.cost import replica_cost
from spotserve.planner.devices import instance_type, price_usd_per_hour
from spotserve.planner.fleets import Pool
from spotserve.planner.models import named_model
from spotserve.planner.pace import pace
from spotserve.planner.search import search
from spotserve.planner.workload import Lengths, Objective, Workload

SIZES = (16, 64, 250, 1000, 4000, 10_000)
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128
STEP_S = 0.1
GRACE_S = 120.0
ENGINE = EngineTerms(max_batch=32)


@dataclass
class Times:
    """Of one kind of event, in seconds."""

    processor: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


class Bench:
    """A fleet at rest, and what happens to it. Machines do at once what they are told."""

    def __init__(self, args: argparse.Namespace, num_instances: int) -> None:
        self.model, self.hardware = named_model(args.model), instance_type(args.instance)
        self.usd_per_hour = price_usd_per_hour(args.instance, spot=True)
        self.sequences, self.at_once, self.profiled = args.sequences, args.at_once, args.profile
        self.is_new_load = args.new_load
        self.zones, self.now_s, self.numbers = args.zones, 0.0, count()
        self.times: dict[str, Times] = {}
        self.profile = cProfile.Profile()
        objective = Objective(ttft_s=args.ttft, tpot_s=args.tpot)
        shapes, most_rps = best_shapes(self.model, self.hardware, self.usd_per_hour, num_instances, objective)
        limits = {"ttft_s": args.ttft, "tpot_s": args.tpot, "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
        fixed = {"pipeline": shapes[0].pipeline, "tensor": shapes[0].tensor}
        shape = fixed if args.planning == "shape" else {}
        settings = {"planning": args.planning, "rate_rps": args.load * most_rps, **limits, **shape}
        self.state = ControllerState(ControllerSettings.model_validate(settings), ENGINE)
        self._stand(num_instances, shapes)

    def _stand(self, num_instances: int, shapes: list[Parallel]) -> None:
        """The fleet as if it had served for a while; the last machine is heard of in the usual way."""
        state = self.state
        machines = [self._launched() for _ in range(num_instances)]
        devices = iter([DeviceId(each.instance_id, index) for each in machines for index in range(self.hardware.num_devices)])
        for number, parallel in enumerate(shapes, start=1):
            planned = ReplicaPlan(replica_id=f"r-{number}", parallel=parallel, instance_type=self.hardware.name)
            taken = {slot: next(devices) for slot in planned.slots}
            state.replicas[planned.replica_id] = Replica(planned, taken, ReplicaState.SERVING, set(taken))
            for slot, device in taken.items():
                state.instances[device.instance_id].held[device.index] = (HeldSlot(device.index, slot, parallel),)
        for replica in state.replicas.values():
            leader = state.instances[replica.leader_id or ""]
            leader.heartbeat, leader.last_heard_s = self.beat(leader.instance_id), self.now_s + 0.5
        last = machines[-1]
        there = [replica for replica in state.replicas.values() if last.instance_id in replica.instance_ids]
        slots = tuple(each for held in last.held.values() for each in held)
        self.obey(self.hear(self._registered(last.instance_id, last.zone, tuple(each.plan for each in there), slots), None))

    def _launched(self) -> Instance:
        """A machine as if it had registered; a turn for each of ten thousand is not what is measured."""
        number = next(self.numbers)
        machine = Instance(f"i-{number:06}", spot=True, zone=f"zone-{number % self.zones}", usd_per_hour=self.usd_per_hour)
        machine.state, machine.address, machine.ranks = InstanceState.READY, Address("host", 1), self._ranks()
        machine.instance_type = self.hardware.name
        self.state.instances[machine.instance_id] = machine
        self.state.hazards.note_joined(machine.instance_id, machine.instance_type, machine.zone, self.now_s)
        return machine

    def _registered(
        self, instance_id: str, zone: str, replicas: tuple[ReplicaPlan, ...] = (), held: tuple[HeldSlot, ...] = ()
    ) -> Registered:
        return Registered(
            instance_id=instance_id,
            address=Address("host", 1),
            pid=1,
            ranks=self._ranks(),
            spot=True,
            zone=zone,
            replicas=replicas,
            held=held,
            model=self.model,
            hardware=self.hardware,
        )

    def _ranks(self) -> tuple[Address, ...]:
        return tuple(Address("host", 2 + index) for index in range(self.hardware.num_devices))

    def beat(self, instance_id: str) -> Heartbeat:
        """What a leader says."""
        reports = tuple(SequenceReport(f"{instance_id}-{index}", 400 + index, 399 + index, 50) for index in range(self.sequences))
        return Heartbeat(
            instance_id=instance_id,
            running=len(reports),
            waiting=0,
            kv_tokens_used=sum(each.context_tokens for each in reports),
            kv_tokens_total=100_000,
            step_s=0.05,
            prefill_tokens_per_s=2000.0,
            store_healthy=True,
            sequences=reports,
        )

    # ------------------------------------------------------------------ what happens

    def hear(self, event: Event, kind: str | None) -> list[Command]:
        """One turn, measured when it has a kind."""
        self.now_s += STEP_S
        for machine in self.state.instances.values():
            machine.last_heard_s = self.now_s
        if self.is_new_load:
            pace.cache_clear()
        if kind is not None and kind == self.profiled:
            self.profile.enable()
        processor_s, wall_s = time.process_time(), time.perf_counter()
        commands = self.state.handle(event, self.now_s)
        wall_s, processor_s = time.perf_counter() - wall_s, time.process_time() - processor_s
        self.profile.disable()
        if kind is not None:
            brings_up = any(isinstance(command, Activate) for command in commands)
            times = self.times.setdefault(f"{kind}, brings up" if brings_up else kind, Times())
            times.processor.append(processor_s)
            times.wall.append(wall_s)
        return commands

    def obey(self, commands: list[Command]) -> None:
        """Every machine does what it is told, until nothing is left to do."""
        while commands:
            answers = [answer for command in commands if (answer := answer_at_once(command, self.model)) is not None]
            commands = [each for answer in answers for each in self.hear(answer, None)]

    def victim(self) -> str:
        """The first machine of another replica every time."""
        serving = [each for each in self.state.replicas.values() if each.state is ReplicaState.SERVING]
        return serving[7919 * next(self.numbers) % len(serving)].instance_ids[-1]

    def lose(self) -> None:
        """Without notice."""
        self.obey(self.hear(InstanceLost(instance_id=self.victim(), reason="preempted"), "loss"))

    def notice(self) -> None:
        """Of a machine that is then taken."""
        victim = self.victim()
        notice = Notice(instance_id=victim, deadline_s=self.now_s + GRACE_S)
        self.obey(self.hear(NoticeReceived(notice=notice), "notice"))
        self.obey(self.hear(InstanceLost(instance_id=victim, reason="preempted"), "loss after notice"))

    def join(self, kind: str = "join") -> None:
        """A machine that has nothing registers."""
        number = next(self.numbers)
        instance_id, zone = f"i-{number:06}", f"zone-{number % self.zones}"
        self.obey(self.hear(InstanceLaunched(instance_id=instance_id, spot=True, zone=zone, usd_per_hour=self.usd_per_hour), None))
        self.obey(self.hear(self._registered(instance_id, zone), kind))

    def join_together(self) -> None:
        """So many machines have come before anything could be planned for them; the same number is then lost."""
        for _ in range(self.at_once - 1):
            self._launched()
        self.join(f"{self.at_once} join")
        for _ in range(self.at_once):
            self.obey(self.hear(InstanceLost(instance_id=self.victim(), reason="preempted"), None))

    def look(self) -> None:
        """At the whole fleet."""
        self.now_s += 60.0
        self.obey(self.hear(Tick(), "look"))

    def heartbeat(self) -> None:
        """Of a leader, and when the controller would have to be woken next."""
        leader = next(replica.leader_id for replica in self.state.replicas.values() if replica.leader_id is not None)
        self.obey(self.hear(self.beat(leader), "heartbeat"))


def best_shapes(
    model: ModelSpec, hardware: InstanceType, usd_per_hour: float, num_instances: int, limits: Objective
) -> tuple[list[Parallel], float]:
    """Shapes of the replicas that serve the most on so many machines, and how much that is, in requests per second."""
    pools = [Pool(hardware, num_instances * hardware.num_devices, usd_per_hour)]
    workload = Workload(1e9, Lengths.fixed(PROMPT_TOKENS), Lengths.fixed(OUTPUT_TOKENS))

    def speed_of(parallel: Parallel, hardware: InstanceType) -> Any:
        return replica_cost(model, parallel, hardware, ENGINE.step_tokens)

    found = search(model, pools, workload, limits, speed_of=speed_of, max_candidates=1, max_batch=ENGINE.max_batch)
    best = found.candidates[0]
    return [choice.parallel for choice in best.choices], best.goodput_rps


def measured(args: argparse.Namespace, num_instances: int) -> list[dict[str, Any]]:
    """One size: a row for each kind of event."""
    bench = Bench(args, num_instances)
    happenings: list[Callable[[], None]] = [bench.lose, bench.lose, bench.notice, bench.join, bench.join, bench.join]
    happenings += [bench.join_together, bench.look, bench.heartbeat]
    for happening in happenings:  # once, not counted: caches are warm in a controller that runs
        happening()
    bench.times.clear()
    bench.profile = cProfile.Profile()
    for _ in range(args.rounds):
        for happening in happenings:
            happening()
    if args.profile:
        pstats.Stats(bench.profile).sort_stats(args.sort).print_stats(args.lines)
    return [
        {
            "instances": num_instances,
            "replicas": len(bench.state.replicas),
            "event": kind,
            "processor_ms": 1e3 * median(times.processor),
            "most_processor_ms": 1e3 * max(times.processor),
            "wall_ms": 1e3 * median(times.wall),
        }
        for kind, times in bench.times.items()
    ]


def shown(rows: list[dict[str, Any]], planning: str) -> Table:
    """For people."""
    table = Table(title=f"one turn of the controller, planning = {planning}")
    for name in ("instances", "replicas", "event", "processor ms", "at most", "wall ms"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (f"{row[key]:.1f}" for key in ("processor_ms", "most_processor_ms", "wall_ms"))
        table.add_row(f"{row['instances']:,}", f"{row['replicas']:,}", row["event"], *figures)
    return table


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-70b")
    parser.add_argument("--instance", default="g5.12xlarge")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="instances")
    parser.add_argument("--zones", type=int, default=3)
    parser.add_argument("--planning", choices=["auto", "shape"], default="auto")
    parser.add_argument("--load", type=float, default=0.85, help="of what the fleet serves at most")
    parser.add_argument("--sequences", type=int, default=8, help="of every leader")
    parser.add_argument("--at-once", type=int, default=10, help="machines that join together")
    parser.add_argument("--new-load", action="store_true", help="as if requests had other lengths at every event")
    parser.add_argument("--ttft", type=float, default=None, help="limit at the 99th percentile, seconds")
    parser.add_argument("--tpot", type=float, default=None, help="the same between two tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", help="kind of event whose profile is printed")
    parser.add_argument("--sort", default="cumulative")
    parser.add_argument("--lines", type=int, default=45)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    rows = [row for size in args.sizes for row in measured(args, size)]
    if args.json:
        print(json.dumps({"model": args.model, "instance": args.instance, "planning": args.planning, "turns": rows}, indent=2))
    else:
        Console().print(shown(rows, args.planning))


if __name__ == "__main__":
    main()
