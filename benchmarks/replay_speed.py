"""How fast a replay is, and how its memory grows: a day of machines that come and go under a conversation load, on one core.

    python benchmarks/replay_speed.py [--hours 24] [--model llama-3-8b] [--devices g5.12xlarge] [--json]

24 instances with the loss statistics of public GPU traces (lives of 99 minutes on average, a third of the losses in bulk, some 7 an
hour), and requests at the mean rate and lengths of Azure's conversation trace of 2023 (5.53 a second, 1,155 and 211 tokens),
Poisson. The controller measures the load as in production. Reading files is not timed; peak memory is that of the process, told
before and after.
"""

import argparse
import json
import resource
import time

from spotserve.planner.devices import instance_type, price_usd_per_hour
from spotserve.planner.models import named_model
from spotserve.replay.generate import FleetModel, LoadModel, fleet_events, load_requests
from spotserve.replay.measures import measure
from spotserve.replay.policies import POLICIES
from spotserve.replay.scenario import Prices, Scenario, show_nothing
from spotserve.replay.summary import Objectives
from spotserve.replay.timeline import Scaling, merge
from spotserve.replay.trace import CapacityTrace, RequestTrace


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--devices", default="g5.12xlarge")
    parser.add_argument("--json", action="store_true", help="for scripts")
    args = parser.parse_args()
    length_s = args.hours * 3600
    fleet = FleetModel(instances=24, duration_s=length_s, mean_life_s=5940, mean_restock_s=5940, zones=3, seed=1)
    load = LoadModel(
        duration_s=length_s,
        rate_per_s=5.53,
        prompt_median=960,
        prompt_low=16,
        prompt_high=4100,
        output_median=160,
        output_low=2,
        output_high=1000,
        length_sigma=0.75,
        seed=2,
    )
    events, requests = fleet_events(fleet), load_requests(load)
    timeline = merge(CapacityTrace(events, "made"), RequestTrace(requests, "made"), Scaling(grace_s=30.0))
    model = named_model(args.model)
    prices = Prices(
        spot_usd_per_hour=price_usd_per_hour(args.devices, spot=True),
        on_demand_usd_per_hour=price_usd_per_hour(args.devices, spot=False),
    )
    machine = instance_type(args.devices, value_bytes=4 if model.value_bytes >= 4 else 2)
    scenario = Scenario(timeline=timeline, model=model, machine=machine, prices=prices)
    before_mb, began_s = _peak_mb(), time.process_time()
    replayed = POLICIES["spotserve"].play(scenario, show_nothing)
    took_s, after_mb = time.process_time() - began_s, _peak_mb()
    measures = measure(replayed, Objectives())
    figures = {
        "requests": len(requests),
        "instance_losses": measures["losses"],
        "processor_s": round(took_s, 1),
        "requests_per_s": round(len(requests) / took_s),
        "times_real_time": round(length_s / took_s),
        "peak_mb_before": round(before_mb),
        "peak_mb_after": round(after_mb),
        "bytes_per_request": round((after_mb - before_mb) * 1e6 / len(requests)),
        "lost": measures["requests_lost"],
        "e2e_p99_s": measures["e2e_p99_s"],
    }
    print(json.dumps(figures) if args.json else "\n".join(f"{name:>20}  {value}" for name, value in figures.items()))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
