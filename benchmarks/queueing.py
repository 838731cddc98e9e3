"""The analytical model of continuous batching against a simulator of it: how far off, and does it choose well?

    python benchmarks/queueing.py
    python benchmarks/queueing.py --requests 20000 --json --out queueing.json

Three tables. *Errors*: model over simulation, mean and 99th percentile of TTFT, TPOT and end to end, per load and variation of
gaps (gamma), over two speeds, one to eight replicas and several kinds of lengths. *Choice*: for one workload many configurations of
the same 16 devices, with the rank correlation of modelled and simulated p99 end to end, and by how much the configuration that the
model likes best is worse than the one that is best in simulation. *Time*: of one call.

The simulator (`tests/planner/batching_twin.py`) goes iteration by iteration and shares nothing with the model but the speeds and
the lengths. Lengths: fixed; the project's own (traces/demo-requests.csv); and, where SPOTSERVE_DATA (or ../shared/data) has them,
Azure's conversations and Mooncake's requests. Simulations are random: each figure has its own noise, some percent in means and ten
and more in percentiles at loads of 0.85 and bursts of 4 and above, where a run holds few independent bursts.
"""

import argparse
import csv
import json
import os
import statistics
import sys
import timeit
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "planner")]

from batching_twin import arrivals, simulate  # noqa: E402

from spotserve.planner.queueing import capacity_rps, latency  # noqa: E402
from spotserve.planner.workload import Lengths, Workload  # noqa: E402

FIGURES = ("TTFT mean", "TTFT p99", "TPOT mean", "TPOT p99", "E2E mean", "E2E p99")


@dataclass(frozen=True)
class Replica:
    """A roofline of one model cut into stages and shards: the longer of reading weights and computing, and what contexts add."""

    max_batch: int
    kv_tokens: int
    weights_s: float
    sequence_s: float
    context_s: float
    prompt_token_s: float
    stages: int = 1

    def token_s(self, sequences: float, context_tokens: float) -> float:
        """See `planner.speed.ReplicaSpeed`."""
        return max(self.weights_s, sequences * self.sequence_s) + context_tokens * self.context_s

    def prompt_s(self, tokens: float) -> float:
        """See `planner.speed.ReplicaSpeed`."""
        return tokens * self.prompt_token_s

    def first_token_s(self, tokens: float) -> float:
        """See `planner.speed.ReplicaSpeed`."""
        return self.stages * self.prompt_s(tokens)


SPEEDS = {
    "weights-bound": Replica(64, 10**7, 0.020, 0.3e-3, 4e-8, 8e-5),
    "compute-bound": Replica(64, 10**7, 0.004, 0.8e-3, 4e-8, 8e-5),
}


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    lengths: str
    speed: str
    replicas: int
    load: float
    gap_cv: float


def workloads(data: Path) -> dict[str, Workload]:
    """Kinds of lengths, at a rate that does not matter."""
    found = {"fixed": Workload(1.0, Lengths.fixed(512), Lengths.fixed(200))}
    sources = {
        "demo": (ROOT / "traces" / "demo-requests.csv", "prompt_tokens", "output_tokens"),
        "azure": (data / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv", "ContextTokens", "GeneratedTokens"),
        "mooncake": (data / "mooncake" / "synthetic_trace.jsonl", "input_length", "output_length"),
    }
    for name, (path, prompt, output) in sources.items():
        if not path.exists():
            print(f"{name}: absent, there is no {path}", file=sys.stderr)
            continue
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else list(csv.DictReader(lines))
        prompts, outputs = ([max(1.0, float(row[column])) for row in rows] for column in (prompt, output))
        found[name] = Workload(1.0, Lengths.of(prompts), Lengths.of(outputs))
    return found


def observed(speeds: Sequence[Replica], workload: Workload, count: int, seed: int) -> list[float]:
    """The six figures in simulation, without the first tenth of the requests."""
    calls = simulate(speeds, arrivals(workload, count, Random(seed)))[count // 10 :]
    several = [call for call in calls if call.output > 1]
    values = ([call.ttft_s for call in calls], [call.tpot_s for call in several], [call.e2e_s for call in calls])
    return [float(figure) for each in values for figure in (np.mean(each), np.quantile(each, 0.99))]


def modelled(speeds: Sequence[Replica], workload: Workload) -> list[float]:
    """The six figures of the model."""
    return list(asdict(latency(speeds, workload)).values())[:6]


def grid(lengths: Sequence[str], replicas: Sequence[int], loads: Sequence[float], gap_cvs: Sequence[float]) -> Iterator[Case]:
    """Every combination."""
    for name in lengths:
        for speed in SPEEDS:
            for count in replicas:
                for load in loads:
                    for gap_cv in gap_cvs:
                        yield Case(name, speed, count, load, gap_cv)


def errors(case: Case, lengths: dict[str, Workload], count: int) -> list[float]:
    """Model over simulation, less 1."""
    speeds = [SPEEDS[case.speed]] * case.replicas
    rate_rps = case.load * case.replicas * capacity_rps(speeds[0], lengths[case.lengths])
    workload = replace(lengths[case.lengths], rate_rps=rate_rps, gap_cv=case.gap_cv)
    seen = observed(speeds, workload, count * (1 + case.replicas // 4), seed=1)
    return [ours / theirs - 1 for ours, theirs in zip(modelled(speeds, workload), seen, strict=True)]


def configurations(devices: int = 16) -> dict[str, list[Replica]]:
    """(D, P, M, B) of a model on `devices` devices: shards speed everything up but cost sums, stages make prompts longer."""
    found = {}
    for stages in (1, 2, 4):
        for shards in (1, 2, 4):
            for max_batch in (8, 32, 128):
                replicas = devices // (stages * shards)
                slower = 1 + 0.3 * (shards - 1) ** 0.7
                tokens = 30_000 * (stages * shards - 0.6)
                speed = Replica(
                    max_batch=max_batch,
                    kv_tokens=int(tokens),
                    weights_s=0.06 * slower / shards + 0.001 * stages,
                    sequence_s=0.8e-3 * slower / shards / stages,
                    context_s=1.5e-7 * slower / shards,
                    prompt_token_s=2.0e-4 * slower / shards / stages,
                    stages=stages,
                )
                found[f"({replicas},{stages},{shards},{max_batch})"] = [speed] * replicas
    return found


def choice(workload: Workload, load: float, gap_cv: float, count: int) -> dict[str, float | str]:
    """How the model's order of configurations compares with the simulator's, by p99 end to end."""
    every = configurations()
    best_rps = max(sum(capacity_rps(speed, workload) for speed in speeds) for speeds in every.values())
    asked = replace(workload, rate_rps=load * best_rps, gap_cv=gap_cv)
    able = {name: speeds for name, speeds in every.items() if latency(speeds, asked).utilisation < 0.97}
    ours = {name: modelled(speeds, asked)[5] for name, speeds in able.items()}
    theirs = {name: observed(speeds, asked, count, seed=2)[5] for name, speeds in able.items()}
    chosen, best = min(ours, key=ours.__getitem__), min(theirs, key=theirs.__getitem__)
    return {
        "load": load,
        "gap_cv": gap_cv,
        "configurations": len(able),
        "rank correlation": float(spearmanr(list(ours.values()), list(theirs.values())).statistic),
        "chosen": chosen,
        "best": best,
        "worse by": theirs[chosen] / theirs[best] - 1,
        "worst is worse by": max(theirs.values()) / theirs[best] - 1,
    }


def cost_ms(speeds: Sequence[Replica], workload: Workload) -> float:
    """Of one call, the median of several."""
    rate_rps = 0.6 * sum(capacity_rps(speed, workload) for speed in speeds)
    asked = replace(workload, rate_rps=rate_rps)
    return statistics.median(timeit.repeat(lambda: latency(speeds, asked), number=10, repeat=21)) * 100


def main() -> None:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=6000, help="per simulation, more where there are more replicas")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.2, 0.5, 0.7, 0.85, 0.95])
    parser.add_argument("--gap-cvs", type=float, nargs="+", default=[0.05, 1, 2, 4, 6])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--lengths", nargs="+", help="of fixed, demo, azure, mooncake")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lengths = workloads(Path(os.environ.get("SPOTSERVE_DATA", ROOT.parent / "shared" / "data")) / "traces" / "requests")
    names = options.lengths or list(lengths)

    points = []
    for case in grid([name for name in names if name in lengths], options.replicas, options.loads, options.gap_cvs):
        points.append((case, errors(case, lengths, options.requests)))
        print(case, *(f"{error:+.0%}" for error in points[-1][1]), file=sys.stderr, flush=True)
    chosen_by = "azure" if "azure" in lengths else "demo"
    choices = [
        choice(lengths[chosen_by], load, gap_cv, options.requests)
        for load, gap_cv in ((0.3, 1), (0.6, 1), (0.8, 1), (0.3, 4), (0.6, 4))
    ]
    one = SPEEDS["weights-bound"]
    fleets = {"1 replica": [one], "8 alike": [one] * 8, "64 alike, batch 256": [replace(one, max_batch=256)] * 64}
    fleets |= {f"{count} kinds": [replace(one, max_batch=64 + index) for index in range(count)] for count in (2, 4)}
    times = {name: cost_ms(speeds, lengths[chosen_by]) for name, speeds in fleets.items()}

    result = {
        "points": [{**asdict(case), **dict(zip(FIGURES, found, strict=True))} for case, found in points],
        "choices": choices,
        "milliseconds": times,
    }
    text = json.dumps(result, indent=2) if options.json else tables(points, choices, times)
    print(text)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2))


def tables(points: Sequence[tuple[Case, list[float]]], choices: Sequence[dict[str, float | str]], times: dict[str, float]) -> str:
    """For people: median error (and the largest) of the points that share lengths, load and variation of gaps."""
    lines = [
        "model / simulation - 1: median of the points (largest)",
        "",
        "lengths   load  CV    points  " + "  ".join(f"{name:>15}" for name in FIGURES),
    ]
    groups: dict[tuple[str, float, float], list[list[float]]] = {}
    for case, found in points:
        groups.setdefault((case.lengths, case.load, case.gap_cv), []).append(found)
    for (name, load, gap_cv), each in groups.items():
        cells = [f"{statistics.median(column):+.0%} ({max(column, key=abs):+.0%})" for column in zip(*each, strict=True)]
        lines.append(f"{name:9} {load:4}  {gap_cv:4}  {len(each):6}  " + "  ".join(f"{cell:>15}" for cell in cells))
    lines += ["", "configurations of 16 devices by p99 end to end"]
    lines += [
        "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in each.items())
        for each in choices
    ]
    lines += ["", "milliseconds per call: " + ", ".join(f"{name} {time:.2f}" for name, time in times.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
