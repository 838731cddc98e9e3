"""What `fidelity.py` has a local cluster serve."""

from spotserve.replay.generate import FleetModel, LoadModel, fleet_events, load_requests
from spotserve.replay.timeline import Scaling, Timeline, merge
from spotserve.replay.trace import CapacityEvent, CapacityTrace, RequestTrace

INSTANCES = 2
JUDGED_S, CALIBRATION_S, STARTS_S = 120.0, 45.0, 72.0
SEEDS = (3, 4, 5)
UNDISTURBED_SEEDS = (12, 13, 14, 17)
"""Of runs between which all traces are served once: three times each."""
BURSTS_CV = 4.0
_COMES_AND_GOES = """
    0 +a  0 +b  8 -a 10 +c 18 -b 20 +d 28 -c 30 +e 38 -d 40 +f
    48 -e 48 -f 50 +g 56 -g 58 +h 64 -h 66 +i
"""
"""Seconds, and who comes or goes: who goes first has weights for who takes its place; when all have gone, machines come alone."""
ALL_GONE_S = 48.0


def itinerary(rate_rps: float) -> list[Timeline]:
    """What the cluster serves, in turn: starts; then all traces that are judged, again and again, between undisturbed runs."""
    timelines = [comes_and_goes(1, rate_rps), undisturbed(UNDISTURBED_SEEDS[0], rate_rps)]
    for seed in UNDISTURBED_SEEDS[1:]:
        timelines += [*(judged(each, rate_rps) for each in SEEDS), undisturbed(seed, rate_rps)]
    return timelines


def requests_of(seed: int, rate_rps: float, length_s: float, *, gap_cv: float = 1.0) -> RequestTrace:
    """Prompts some four times as long as answers, as in the Azure trace of conversations."""
    load = LoadModel(
        duration_s=length_s,
        rate_per_s=rate_rps,
        arrivals="gamma",
        gap_cv=gap_cv,
        prompt_median=400,
        prompt_low=150,
        prompt_high=750,
        output_median=100,
        output_low=40,
        output_high=200,
        length_sigma=0.4,
        seed=seed,
    )
    return RequestTrace(load_requests(load), "made")


def judged(seed: int, rate_rps: float) -> Timeline:
    """Two minutes of requests on machines that live 40 seconds in the mean; half of the losses have three seconds of notice."""
    model = FleetModel(
        instances=INSTANCES, duration_s=JUDGED_S, mean_life_s=40, mean_restock_s=5, keep=0, bulk_share=0.0, seed=seed
    )
    scaling = Scaling(grace_s=3.0, notice_share=0.5, duration_s=JUDGED_S, seed=seed)
    return merge(CapacityTrace(fleet_events(model), "made"), requests_of(seed, rate_rps, JUDGED_S), scaling)


def undisturbed(seed: int, rate_rps: float) -> Timeline:
    """Machines that stay, and bursts of requests: batches of all sizes that losses will lead to."""
    stays = tuple(CapacityEvent(0.0, "add", f"i{number}") for number in range(INSTANCES))
    return merge(
        CapacityTrace(stays, "made"),
        requests_of(seed, rate_rps, CALIBRATION_S, gap_cv=BURSTS_CV),
        Scaling(duration_s=CALIBRATION_S),
    )


def comes_and_goes(seed: int, rate_rps: float) -> Timeline:
    """Machines that start where something else serves, and where nothing does."""
    words = _COMES_AND_GOES.split()
    events = [
        CapacityEvent(float(at_s), "add" if who[0] == "+" else "remove", who[1:])
        for at_s, who in zip(words[::2], words[1::2], strict=True)
    ]
    scaling = Scaling(grace_s=3.0, notice_share=1.0, duration_s=STARTS_S)
    return merge(CapacityTrace(tuple(events), "made"), requests_of(seed, rate_rps, STARTS_S), scaling)
