"""A small replay by hand, a policy that is quick and the same each time, and traces for it."""

from pathlib import Path

from hypothesis import strategies as st

from spotserve.planner.devices import instance_type
from spotserve.planner.models import named_model
from spotserve.replay.outcome import Gaps, Lease, Outcome, Outcomes, Replayed
from spotserve.replay.policies import Policy
from spotserve.replay.record import FleetEvent
from spotserve.replay.scenario import Prices, Scenario, Show
from spotserve.replay.study import StudyOptions
from spotserve.replay.timeline import GiveNotice, Launch, Take

FLEET = "time_s,event,instance\n0,add,a\n0,add,b\n30,remove,a\n40,add,c\n70,remove,b\n100,remove,c\n"
LOAD = "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{2 * i},{50 + i},{10 + i % 5}\n" for i in range(50))


def outcome(index: int, arrival_s: float, first_s: float | None, end_s: float, tokens: int = 5, **rest) -> Outcome:
    return Outcome(
        **{
            "index": index,
            "arrival_s": arrival_s,
            "prompt_tokens": 10,
            "output_tokens": tokens,
            "first_token_s": first_s,
            "end_s": end_s,
            "is_whole": True,
            "tokens": tokens,
            **rest,
        }
    )


def event(at_s: float, kind: str, instance: str | None = None, **details: object) -> FleetEvent:
    return FleetEvent(at_s, kind, instance, details)


def by_hand() -> Replayed:
    """Ten seconds short of two minutes; a loss with notice that costs 20 s, one without that nothing heals."""
    gaps = Gaps()
    gaps.add(0.5, 8)
    gaps.add(5.0)
    return Replayed(
        policy="hand",
        seed=0,
        duration_s=100.0,
        ended_s=110.0,
        outcomes=Outcomes(
            [
                outcome(0, 0.0, 1.0, 3.0),
                outcome(1, 8.0, 8.5, 17.0, longest_gap_s=5.0, longest_gap_end_s=14.0, moved=1),
                outcome(2, 70.0, 74.0, 75.0, tokens=1, longest_gap_s=0.0),
                outcome(3, 89.0, None, 110.0, tokens=0, output_tokens=7, is_whole=False, restarted=2, recomputed_tokens=12),
            ]
        ),
        gaps=gaps,
        fleet_events=(
            event(0.0, "plan", shape="2 x (P=1, M=2)", replicas=2, reason="start"),
            event(0.0, "serving", replicas=2, planned=2),
            event(5.0, "notice", "a", deadline_s=10.0),
            event(9.0, "serving", replicas=1, planned=2),
            event(10.0, "lost", "a", notice=True),
            event(10.0, "lost", "b", notice=True),
            event(30.0, "serving", replicas=2, planned=2),
            event(30.0, "settled", since_s=9.0),
            event(90.0, "lost", "c", notice=False),
            event(90.0, "serving", replicas=0, planned=2),
        ),
        leases=(Lease("a", True, 0.0, 10.0, 1.8), Lease("c", True, 0.0, 90.0, 1.8), Lease("d", False, 10.0, 100.0, 4.0)),
        on_demand_usd_per_hour=4.0,
        weights_moved_bytes=3,
        weights_read_bytes=4,
        kv_moved_bytes=5,
    )


def quick(scenario: Scenario, show: Show, name: str = "quick", slowness: float = 1.0) -> Replayed:
    """A second and a tenth for each token; what is under way at a loss waits five seconds, or is lost if nobody told."""
    timeline, gaps, outcomes = scenario.timeline, Gaps(), []
    losses = [(take.at_s, take.noticed) for take in timeline.losses]
    for each in timeline.arrivals:
        first_s = each.at_s + slowness
        end_s = first_s + 0.1 * slowness * (each.output_tokens - 1)
        gaps.add(0.1 * slowness, each.output_tokens - 1)
        met = [noticed for at_s, noticed in losses if each.at_s <= at_s <= end_s]
        gap_s = 5.0 if met else 0.1
        ended_s = end_s + (gap_s if met else 0.0)
        outcomes.append(
            outcome(
                each.index,
                each.at_s,
                first_s,
                ended_s,
                each.output_tokens,
                prompt_tokens=each.prompt_tokens,
                is_whole=all(met),
                longest_gap_s=gap_s,
                longest_gap_end_s=ended_s,
                resumed=len(met),
            )
        )
        show(each.at_s, len(outcomes), 2)
    events, since_s, leases = [event(0.0, "serving", replicas=2, planned=2)], dict.fromkeys(timeline.initial, 0.0), []
    for action in timeline.actions:
        if isinstance(action, Launch):
            since_s[action.instance] = action.at_s
            events.append(event(action.at_s, "launched", action.instance, spot=True))
        elif isinstance(action, GiveNotice):
            events.append(event(action.at_s, "notice", action.instance, deadline_s=action.deadline_s))
        elif isinstance(action, Take):
            price = scenario.prices.spot_usd_per_hour
            leases.append(Lease(action.instance, True, since_s.pop(action.instance), action.at_s, price))
            events.append(event(action.at_s, "lost", action.instance, notice=action.noticed))
            events.append(event(action.at_s, "serving", replicas=1, planned=2))
    return Replayed(
        policy=name,
        seed=scenario.seed,
        duration_s=timeline.duration_s,
        ended_s=max((each.end_s for each in outcomes), default=0.0),
        outcomes=Outcomes(sorted(outcomes, key=lambda each: (each.end_s, each.index))),
        gaps=gaps,
        fleet_events=tuple(events),
        leases=tuple(leases),
        on_demand_usd_per_hour=scenario.prices.on_demand_usd_per_hour,
    )


def slow(scenario: Scenario, show: Show) -> Replayed:
    return quick(scenario, show, "slow", slowness=3.0)


POLICIES = {
    "quick": Policy("quick", "answers soon", "all else", quick),
    "slow": Policy("slow", "answers late", "all else", slow),
    "spotserve": Policy("spotserve", "stands for ours", "all else", quick),
}


def write_traces(folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    fleet, load = folder / "fleet.csv", folder / "load.csv"
    fleet.write_text(FLEET)
    load.write_text(LOAD)
    return fleet, load


def study_options(folder: Path, **rest) -> StudyOptions:
    fleet, load = write_traces(folder)
    return StudyOptions(
        **{
            "capacity": (fleet,),
            "requests": load,
            "model": named_model("llama-3-8b"),
            "machine": instance_type("g5.12xlarge"),
            "prices": Prices(spot_usd_per_hour=2.0, on_demand_usd_per_hour=5.0),
            "policies": ("quick",),
            **rest,
        }
    )


@st.composite
def replays(draw: st.DrawFn) -> Replayed:
    """Any small replay, in tenths of seconds."""
    tenths = st.integers(0, 600).map(lambda n: n / 10)
    outcomes = []
    for index in range(draw(st.integers(0, 12))):
        arrival_s = draw(tenths)
        first_s = arrival_s + draw(tenths) if draw(st.booleans()) else None
        end_s = (arrival_s if first_s is None else first_s) + draw(tenths)
        tokens = 0 if first_s is None else draw(st.integers(1, 9))
        whole = first_s is not None and draw(st.booleans())
        gap_s = draw(st.sampled_from([0.0, 0.5, 2.0]))
        ways = {name: draw(st.integers(0, 2)) for name in ("moved", "resumed", "restarted", "recomputed_tokens")}
        outcomes.append(
            outcome(index, arrival_s, first_s, end_s, tokens, is_whole=whole, longest_gap_s=gap_s, longest_gap_end_s=end_s, **ways)
        )
    events = [event(at_s, "lost", f"i{at_s}", notice=draw(st.booleans())) for at_s in draw(st.lists(tenths, max_size=4))]
    counts = st.tuples(tenths, st.integers(0, 3), st.integers(0, 3))
    events += [event(at_s, "serving", replicas=replicas, planned=planned) for at_s, replicas, planned in draw(st.lists(counts))]
    bills = draw(st.lists(st.tuples(st.booleans(), tenths, tenths, st.sampled_from([1.0, 3.0])), max_size=4))
    leases = [Lease("x", spot, at_s, at_s + length_s, price) for spot, at_s, length_s, price in bills]
    return Replayed(
        policy="any",
        seed=0,
        duration_s=60.0,
        ended_s=max([60.0, *(each.end_s for each in outcomes)]),
        outcomes=Outcomes(outcomes),
        gaps=Gaps(),
        fleet_events=tuple(sorted(events, key=lambda each: each.time_s)),
        leases=tuple(leases),
        on_demand_usd_per_hour=3.0,
    )
