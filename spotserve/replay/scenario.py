"""What every policy of a replay is given: the same machines that come and go, the same requests, the same model and physics.

Values only. What the cloud does is in the timeline; how long things take is here; what is done about it is a policy's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from spotserve.controller.proposals import EngineTerms
from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec
from spotserve.migration.spotserve_2024 import PublishedShape
from spotserve.planner.drafting import Draft
from spotserve.planner.memory import STEP_TOKENS
from spotserve.planner.profiles import Profile
from spotserve.planner.shapes import SpeedOf
from spotserve.planner.workload import Objective, Workload
from spotserve.replay.summary import Objectives
from spotserve.replay.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Of one machine."""

    spot_usd_per_hour: float
    on_demand_usd_per_hour: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """What takes time besides computing and sending. Bytes between machines go at the speed of their network."""

    start_up_s: float = 120.0
    """From renting a machine until its worker takes commands: launch and start-up as in SpotServe (ASPLOS'24, section 6.1). A
    trace's `add` is the moment of renting; traces that hold the start already are replayed with 0."""
    file_bytes_per_s: float = 110e6
    """Weights from files into one device: 157 M numbers of 4 bytes took 5.74 s from S3 by the log of SpotServe's artifact."""
    bring_up_s: float = 1.0
    """From having its weights until a slot serves: building the stage, joining the group."""
    moves_at_once: bool = False
    """Whether bytes between machines take no time: nobody's network, for an upper bound."""
    loss_heard_s: float | None = None
    """From a loss without notice until the controller hears of it; None: it finds out, by the silence of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedCase:
    """What the policies of the SpotServe paper need to know besides: measured times, and what the artifact's scripts set."""

    profile: Profile
    shape: PublishedShape
    required_rps: float
    """Throughput that is enough, a constant of every experiment."""
    min_devices: int
    """Of the smallest replica (`min_world_size`)."""
    max_tensor: int | None = None
    """None: as the profile says."""
    max_batch: int = 4
    divide_prefill: bool = True
    """Whether prompts are divided by their micro-batches in the rule, as published; see `planner.spotserve_2024`."""
    run_as_published: bool = True
    """Whether batches take the time of the published formula, which the paper's measured latencies agree with best (see
    benchmarks/paper.py); otherwise what their micro-batches were measured to take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One replay to be played by any policy."""

    timeline: Timeline
    model: ModelSpec
    machine: InstanceType
    """What all instances are."""
    prices: Prices
    delays: Delays = field(default_factory=Delays)
    objectives: Objectives = field(default_factory=Objectives)
    """What an answer must meet to count for goodput."""
    limits: Objective = field(default_factory=Objective)
    """What the planner is to keep; nothing: as soon as can be."""
    speed_of: SpeedOf | None = None
    """How fast a shape is; None: as the cost model says."""
    published: PublishedCase | None = None
    """None: made from the cost model where a published policy is asked for."""
    rents: bool = False
    """Whether a policy that can rents only the machines it wants of those that the trace has; else all of them are paid for."""
    falls_back: bool = True
    """Whether a policy that rents may stand in with machines on demand while the trace has none."""
    most_machines: int = 64
    """That a policy rents."""
    workload: Workload | None = None
    """The load that policies are told of; None: they measure it."""
    max_batch: int = 256
    """Sequences that a replica runs at once at most."""
    step_tokens: int = STEP_TOKENS
    """Tokens of the largest step: longer prompts are cut into pieces, between which everybody else gets a token."""
    draft: Draft | None = None
    """Speculation, as a rate: what every replica drafts with; None: nothing."""
    grace_s: float = 30.0
    """Of every notice; also in the timeline."""
    seed: int = 0

    @property
    def engine(self) -> EngineTerms:
        """What replicas are started with."""
        return EngineTerms(self.max_batch, step_tokens=self.step_tokens, speed_of=self.speed_of, draft=self.draft)


Show: TypeAlias = Callable[[float, int, int], None]
"""Told now and then how far a replay is: seconds of the replay, requests ended, machines rented."""


def show_nothing(now_s: float, ended: int, machines: int) -> None:
    """For when nobody looks."""
    del now_s, ended, machines
