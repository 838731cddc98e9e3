"""Who decides in a replay: ours, which is the production controller, and the baselines, by name.

Each says in a line what it models and what it leaves out. All play the same `Scenario`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spotserve.core.errors import ConfigError
from spotserve.replay import ours, spothedge
from spotserve.replay.outcome import Replayed
from spotserve.replay.published_case import published_case
from spotserve.replay.scenario import Scenario, Show
from spotserve.replay.static_fleet import Reaction, StaticFleet


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to run the fleet."""

    name: str
    models: str
    """What it is, in a line."""
    leaves_out: str
    """What the thing it models has and this has not, in a line."""
    play: Callable[[Scenario, Show], Replayed]


def spotserve_2024(scenario: Scenario, show: Show) -> Replayed:
    """SpotServe (Miao et al., ASPLOS'24)."""
    return StaticFleet(scenario, published_case(scenario), Reaction.MIGRATE, policy="spotserve-2024", show=show).play()


def rerouting(scenario: Scenario, show: Show) -> Replayed:
    """Its first baseline (section 6.1 there)."""
    return StaticFleet(scenario, published_case(scenario), Reaction.REROUTE, policy="rerouting", show=show).play()


def reparallelization(scenario: Scenario, show: Show) -> Replayed:
    """Its second baseline (section 6.1 there)."""
    return StaticFleet(scenario, published_case(scenario), Reaction.RESTART, policy="reparallelization", show=show).play()


POLICIES: Mapping[str, Policy] = {
    each.name: each
    for each in (
        Policy(
            "spotserve",
            "the production controller, router and batching, on all machines of the trace or those that it rents",
            "tokens are not computed: times are those of the cost model or a profile",
            ours.spotserve,
        ),
        Policy(
            "spotserve-2024",
            "SpotServe as its paper and artifact have it: rule, mapping, migration, arranger, static batches",
            "nothing it publishes; batches that it loses are queued again, and where too few machines are left it waits",
            spotserve_2024,
        ),
        Policy(
            "rerouting",
            "SpotServe's baseline: pipelines of one shape come and go whole, and requests of a lost one are computed anew",
            "any other shape, whatever machines there are",
            rerouting,
        ),
        Policy(
            "reparallelization",
            "SpotServe's baseline: its rule, but every change starts all engines anew and computes everything again",
            "any use of the notice",
            reparallelization,
        ),
        Policy(
            "spothedge",
            "SkyServe's SpotHedge: whole replicas, one spare on spot, on demand while spot ones are not ready, clients that retry",
            "its autoscaler: the mean load is known from the start; its delays in probing and routing; prices by zone",
            spothedge.play,
        ),
        Policy(
            "on-demand",
            "the production controller on machines that are never taken, as many as the load needs",
            "the hours for which one would have to rent ahead",
            ours.on_demand,
        ),
        Policy(
            "oracle",
            "the production controller that hears of every loss in time, of machines before they come, and moves bytes in no time",
            "plans that only a look at requests to come could make",
            ours.oracle,
        ),
    )
}


def policy_named(name: str) -> Policy:
    """The policy of this name.

    Raises:
        ConfigError: there is none; the message lists those that there are.
    """
    if name not in POLICIES:
        raise ConfigError(f"--policy {name}: expected one of {', '.join(POLICIES)}")
    return POLICIES[name]
