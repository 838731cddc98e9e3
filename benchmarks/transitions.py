"""Every transition of real spot traces, policy beside policy: dollars, modelled latency, bytes moved, makespan.

    SPOTSERVE_DATA=~/data python benchmarks/transitions.py
    python benchmarks/transitions.py --models 20B --traces B_S --each
    python benchmarks/transitions.py --json

Inputs are those of SpotServe's paper (Miao et al., ASPLOS'24, table 1 and section 6.1): machines of four T4 (g4dn.12xlarge), three
models in float32, prompts of 512 and outputs of 128 tokens, its segments A_S and B_S, and the whole AWS trace that they were cut
from. The data is not part of this project: `SPOTSERVE_DATA` names the folder with the published profiles and traces (unset:
`../shared/data` beside the checkout).

At every transition the same number of sequences is in flight, rate times the latency of a request alone (Little's law), each with
the KV of its prompt and half of its output. Bytes are those that the model needs; what a policy sends beyond them stands in the
table below its own. The makespan is a lower bound for every policy alike: bytes of the busiest port at full speed, both directions
at once. Policies go their own ways along a trace; `--leader NAME` lets all start every transition from that one's state. With more
than one policy a third table holds the others against the first, transition by transition.
"""

import argparse
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isclose, isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transition_judge import Case, Machines, Modelled, Policy, Verdict, walk
from transition_ours import OurPolicy
from transition_published import MAX_BATCH, PublishedPolicy
from transition_traces import read_transitions

from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.migration.spotserve_2024 import PublishedShape
from spotserve.planner.profile_speed import published_model
from spotserve.planner.profiles import read_profile
from spotserve.planner.queueing import latency
from spotserve.planner.spotserve_2024 import latency_ms
from spotserve.planner.workload import Lengths, Workload

POLICIES: dict[str, Callable[[Case], Policy]] = {
    "spotserve-2024": PublishedPolicy,
    "spotserve": OurPolicy,
    "spotserve, B <= 4": partial(OurPolicy, max_batch=MAX_BATCH),
    "spotserve, only what pays": partial(OurPolicy, use_idle=False),
}
"""Who is compared, by name; the first is what others are held against."""
MODELLED: Modelled = latency
"""What gives the modelled latency."""


@dataclass(frozen=True, slots=True)
class PaperModel:
    """A model of the paper's table 1, and how the artifact's scripts (`scripts_ae/aws_e2e.sh`, configurations) run it."""

    profile: str
    vocabulary_size: int
    alone: tuple[int, int]
    """(P, M) of the smallest replica; its latency is that of a request alone."""
    required_rps: float
    rate_rps: float

    @property
    def min_devices(self) -> int:
        """Of the smallest replica."""
        return self.alone[0] * self.alone[1]


MODELS = {
    "6.7B": PaperModel("megatron_6.7B_profile.json", 51200, (1, 4), 2.0, 1.5),
    "20B": PaperModel("megatron_h6144_profile.json", 51200, (3, 4), 0.4, 0.35),
    "30B": PaperModel("megatron_h7168_profile.json", 50304, (2, 8), 0.2, 0.2),
}
TRACES = {"g4dn": "g4dn.csv", "A_S": "trace_seg/trace_0304_real.txt", "B_S": "trace_seg/trace_0506_real.txt"}


def _case(data: Path, name: str, args: argparse.Namespace) -> Case:
    paper = MODELS[name]
    path = data / "profiles" / "spotserve" / "T4-4x" / paper.profile
    profile = read_profile(path.read_bytes(), str(path))
    context = args.prompt_tokens + args.output_tokens
    prompt, output = Lengths.fixed(args.prompt_tokens), Lengths.fixed(args.output_tokens)
    return Case(
        name=name,
        profile=profile,
        model=published_model(profile, vocabulary_size=paper.vocabulary_size, context_tokens=context),
        published=PublishedShape(
            profile.num_layers, profile.padded_layers, profile.hidden_size, paper.vocabulary_size, positions=context
        ),
        required_rps=paper.required_rps,
        workload=Workload(paper.rate_rps, prompt, output, args.gap_cv),
        min_devices=paper.min_devices,
        filled_tokens=args.prompt_tokens + args.output_tokens // 2,
        memory_share=args.memory_share,
        machines=Machines(_machine(args.network_gbit * 1e9 / 8), args.usd_per_hour, args.grace),
    )


def _machine(network_bytes_per_s: float) -> InstanceType:
    """g4dn.12xlarge (AWS): four T4 of 16 GB, 8.1 TFLOP/s in float32 and 320 GB/s each (NVIDIA's data sheet), on PCIe 3.0; the
    artifact takes the inside of a machine to be as fast as its network."""
    t4 = DeviceType(name="T4", memory_bytes=16 * 10**9, flops_per_s=8.1e12, memory_bytes_per_s=320e9, layer_overhead_s=0.0)
    return InstanceType(
        name="g4dn.12xlarge",
        device=t4,
        num_devices=4,
        device_link=Link(0.0, 50e9 / 8),
        network=Link(0.0, network_bytes_per_s),
        host_memory_bytes=192 * 2**30,
        host_link=Link(0.0, 12e9),
    )


def _in_flight(case: Case) -> int:
    """Little's law for a request that waits for nothing."""
    pipeline, tensor = MODELS[case.name].alone
    milliseconds = latency_ms(case.profile, pipeline=pipeline, tensor=tensor, output_tokens=round(case.workload.output.mean))
    return round(case.workload.rate_rps * milliseconds / 1000)


def _summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """One policy along one trace. Means of dollars and latency are over transitions; bytes and seconds are sums."""
    configurations = Counter(each.decision.label for each in verdicts)
    own: Counter[str] = Counter()
    for each in verdicts:
        own.update(each.decision.own)
    p99_s = [each.e2e_p99_s for each in verdicts if each.e2e_p99_s is not None]
    finite = [each for each in p99_s if isfinite(each)]
    return {
        "transitions": len(verdicts),
        "changes": sum(bool(each.decision.transfers) for each in verdicts),
        "without service": sum(not each.decision.state.replicas for each in verdicts),
        "interrupted replicas": sum(each.decision.interrupted for each in verdicts),
        "idle instances": statistics.mean(each.idle_instances for each in verdicts),
        "held instances": statistics.mean(len(each.decision.held) for each in verdicts),
        "usd_per_hour": statistics.mean(each.usd_per_hour for each in verdicts),
        "e2e_p99_s": statistics.mean(finite) if finite else None,
        "overloaded": len(p99_s) - len(finite),
        "moved_bytes": sum(each.moved_bytes for each in verdicts),
        "network_bytes": sum(each.network_bytes for each in verdicts),
        "makespan_s": sum(each.makespan_s for each in verdicts),
        "longest_makespan_s": max((each.makespan_s for each in verdicts), default=0.0),
        "own": dict(own),
        "configurations": dict(configurations.most_common()),
    }


MEASURES: dict[str, Callable[[Verdict], float | None]] = {
    "usd_per_hour": lambda verdict: verdict.usd_per_hour,
    "e2e_p99_s": lambda verdict: verdict.e2e_p99_s,
    "moved_bytes": lambda verdict: verdict.moved_bytes,
    "makespan_s": lambda verdict: verdict.makespan_s,
}
"""What policies are held against each other by; less is better."""


def _against(first: Sequence[Verdict], other: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """By measure, on how many transitions `other` is better, level and worse, and both sums over those where both are finite."""
    report = {}
    for name, measure in MEASURES.items():
        pairs = [
            (a, b)
            for one, two in zip(first, other, strict=True)
            if (a := measure(one)) is not None and (b := measure(two)) is not None
        ]
        level = sum(a == b or isclose(a, b, rel_tol=1e-6) for a, b in pairs)
        better = sum(b < a and not isclose(a, b, rel_tol=1e-6) for a, b in pairs)
        finite = [(a, b) for a, b in pairs if isfinite(a) and isfinite(b)]
        report[name] = {
            "better": better,
            "level": level,
            "worse": len(pairs) - level - better,
            "first": sum(a for a, _ in finite),
            "other": sum(b for _, b in finite),
        }
    return report


def _rows(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Transition by transition."""
    return [
        {
            "time_s": each.transition.time_s,
            "leave": sorted(each.transition.leaving),
            "join": sorted(each.transition.joining),
            "instances": len(each.transition.after),
            "configuration": each.decision.label,
            "usd_per_hour": each.usd_per_hour,
            "e2e_p99_s": each.e2e_p99_s,
            "moved_bytes": each.moved_bytes,
            "makespan_s": each.makespan_s,
            "own": dict(each.decision.own),
        }
        for each in verdicts
    ]


def _print(report: dict[str, Any], each: bool) -> None:
    console = Console(width=200)
    told = ["trace", "model", "policy", "transitions", "changes", "no service", "idle", "$/h", "p99 s", "GB moved", "GB network"]
    table = Table(*told, "makespan s", "longest", title="policy beside policy, the same inputs")
    details = Table("trace", "model", "policy", "configurations (transitions)", "figures of its own", title="what was chosen")
    for run in report["runs"]:
        totals = run["totals"]
        p99_s = "-" if totals["e2e_p99_s"] is None else f"{totals['e2e_p99_s']:.1f} ({totals['overloaded']} overloaded)"
        table.add_row(
            run["trace"],
            run["model"],
            run["policy"],
            str(totals["transitions"]),
            str(totals["changes"]),
            str(totals["without service"]),
            f"{totals['idle instances']:.2f} of {totals['held instances']:.2f}",
            f"{totals['usd_per_hour']:.2f}",
            p99_s,
            f"{totals['moved_bytes'] / 1e9:,.0f}",
            f"{totals['network_bytes'] / 1e9:,.0f}",
            f"{totals['makespan_s']:.1f}",
            f"{totals['longest_makespan_s']:.1f}",
        )
        chosen = ", ".join(f"{label} {count}" for label, count in totals["configurations"].items())
        figures = ", ".join(f"{name} {value:,.1f}" for name, value in totals["own"].items())
        details.add_row(run["trace"], run["model"], run["policy"], chosen, figures)
    console.print(table, details)
    if report["against"]:
        console.print(_comparison(report["against"]))
    if each:
        for run in report["runs"]:
            console.print(f"\n{run['trace']}, {run['model']}, {run['policy']}", *map(str, run["each"]), sep="\n")


def _comparison(against: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        "trace", "model", "policy", *MEASURES, title=f"against {against[0]['first']}: better / level / worse, ratio of sums"
    )
    for pair in against:
        cells = []
        for name in MEASURES:
            measured = pair["measures"][name]
            ratio = f"{measured['other'] / measured['first']:.3f}" if measured["first"] else "-"
            cells.append(f"{measured['better']} / {measured['level']} / {measured['worse']}, {ratio}")
        table.add_row(pair["trace"], pair["model"], pair["policy"], *cells)
    return table


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--traces", nargs="+", choices=list(TRACES), default=list(TRACES))
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--leader", choices=list(POLICIES), help="whose state all start every transition from (else each its own)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--gap-cv", type=float, default=1.0, help="burstiness of arrivals; 1: Poisson")
    parser.add_argument("--memory-share", type=float, default=0.9, help="of a device's memory, for weights and KV")
    parser.add_argument("--network-gbit", type=float, default=50.0, help="of each direction of a machine's port")
    parser.add_argument("--usd-per-hour", type=float, default=1.9046, help="spot price of a machine (the paper's)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds from notice to transition")
    parser.add_argument("--each", action="store_true", help="print every transition, not only the totals")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    data = Path(os.environ.get("SPOTSERVE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    folder = data / "traces" / "spot" / "spotserve"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there: set SPOTSERVE_DATA to a folder with the traces of SpotServe's artifact")
    if args.leader is not None and args.leader not in args.policies:
        raise SystemExit(f"--leader {args.leader} is none of --policies {' '.join(args.policies)}")
    runs, against = [], []
    for trace in args.traces:
        transitions = read_transitions(folder / TRACES[trace])
        for name in args.models:
            case = _case(data, name, args)
            policies = {policy: POLICIES[policy](case) for policy in args.policies}
            along = walk(case, transitions, policies, sequences=_in_flight(case), modelled=MODELLED, leader=args.leader)
            first, *others = args.policies
            for policy, verdicts in along.items():
                totals = _summary(verdicts)
                runs.append({"trace": trace, "model": name, "policy": policy, "totals": totals, "each": _rows(verdicts)})
            for policy in others:
                measures = _against(along[first], along[policy])
                against.append({"trace": trace, "model": name, "first": first, "policy": policy, "measures": measures})
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "each")}
    report = {"settings": settings, "runs": runs, "against": against}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, args.each)


if __name__ == "__main__":
    main()
