"""The production controller in a replay: as it is, and put into other circumstances that it can be measured against.

Each is a function from a scenario to what came of it. Pure.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spotserve.config import ControllerSettings
from spotserve.controller.hedging import Place
from spotserve.controller.methods import PRODUCTION, Methods
from spotserve.controller.state import ControllerState
from spotserve.replay.outcome import Replayed
from spotserve.replay.scenario import Delays, Scenario, Show
from spotserve.replay.simulate import Simulation
from spotserve.replay.timeline import Action, Arrive, GiveNotice, Launch, Timeline

FORESIGHT_S = 5.0
"""How early an oracle lets go of a machine: bytes move in no time, and every second of a machine is worth having."""

_ENDLESS = 1e18
"""Bytes per second where reading takes no time."""


def play_production(
    scenario: Scenario, show: Show, *, policy: str, settings: Mapping[str, Any] | None = None, methods: Methods = PRODUCTION
) -> Replayed:
    """The production controller, with settings of its own beside what the scenario says."""
    chosen = ControllerSettings.model_validate({**settings_of(scenario), **(settings or {})})
    rents = chosen.instances is not None
    state = ControllerState(chosen, scenario.engine, _places(scenario) if rents else (), methods)
    return Simulation(scenario, state, policy=policy, rents=rents, show=show).play()


def settings_of(scenario: Scenario) -> dict[str, Any]:
    """What a user of the production controller would set for a scenario."""
    limits, workload = scenario.limits, scenario.workload
    found: dict[str, Any] = {"planning": "auto", "ttft_s": limits.ttft_s, "tpot_s": limits.tpot_s, "e2e_s": limits.e2e_s}
    if scenario.rents:
        found |= {"instances": "auto", "max_instances": scenario.most_machines, "fall_back": scenario.falls_back}
    if workload is not None:
        lengths = {"prompt_tokens": round(workload.prompt.mean), "output_tokens": round(workload.output.mean)}
        found |= {"rate_rps": workload.rate_rps, "gap_cv": workload.gap_cv, **lengths}
    return found


def _places(scenario: Scenario) -> tuple[Place, ...]:
    """Every zone that the trace names."""
    zones = set(scenario.timeline.initial.values())
    zones |= {action.zone for action in scenario.timeline.actions if isinstance(action, Launch)}
    prices = scenario.prices
    return tuple(Place(zone, prices.spot_usd_per_hour, prices.on_demand_usd_per_hour) for zone in sorted(zones or {""}))


def spotserve(scenario: Scenario, show: Show) -> Replayed:
    """Ours."""
    return play_production(scenario, show, policy="spotserve")


def on_demand(scenario: Scenario, show: Show) -> Replayed:
    """Ours where no spot machine is to be had: it rents as many on demand as requests need, and none is taken."""
    arrivals: tuple[Action, ...] = scenario.timeline.arrivals
    alone = replace(scenario, timeline=replace(scenario.timeline, initial={}, actions=arrivals))
    settings = {"instances": "auto", "max_instances": scenario.most_machines, "fall_back": True}
    return play_production(alone, show, policy="on-demand", settings=settings)


def oracle(scenario: Scenario, show: Show) -> Replayed:
    """Ours as it would be if it knew the trace: it hears of every loss just in time and of machines before they come, and
    weights and KV move in no time. What no controller on this trace can do better, but for its plans."""
    known = replace(
        scenario,
        timeline=_foreseen(scenario.timeline),
        delays=Delays(start_up_s=0.0, file_bytes_per_s=_ENDLESS, bring_up_s=0.0, loss_heard_s=0.0, moves_at_once=True),
    )
    return play_production(known, show, policy="oracle")


def _foreseen(timeline: Timeline) -> Timeline:
    """Every loss with a notice `FORESIGHT_S` ahead, or as early as its machine is there."""
    since_s: dict[str, float] = dict.fromkeys(timeline.initial, 0.0)
    actions: list[Action] = []
    for action in timeline.actions:
        if isinstance(action, Launch):
            since_s[action.instance] = action.at_s
            actions.append(action)
        elif isinstance(action, Arrive):
            actions.append(action)
        elif not isinstance(action, GiveNotice):
            told_s = max(since_s[action.instance], action.at_s - FORESIGHT_S)
            actions += [GiveNotice(told_s, action.instance, action.at_s), replace(action, noticed=True)]
    return replace(timeline, actions=tuple(sorted(actions, key=lambda action: action.at_s)))
