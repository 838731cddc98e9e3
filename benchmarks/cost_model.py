"""How well three constants describe a GPU, and two a link: the planner's cost model against public measurements.

    SPOTSERVE_DATA=~/data python benchmarks/cost_model.py
    python benchmarks/cost_model.py --data ~/data --json

Needs `profiles/vidur` (microsoft/vidur, data/profiling) and `profiles/spotserve` (Hsword/SpotServe, branch artifact).

Devices: measured times of the operators of one decoder layer of LLaMA-2-7B and -70B (attention core apart), 1 to 4,096 tokens, 1
to 8 shards, rows shuffled with a seed and cut into four quarters. Three quarters of both models are fitted together with the code
that calibrates a worker, the fourth is predicted; all four rotations. The prior of the fit is another GPU (T4), so that nothing
is known beforehand. An error is |predicted / measured - 1|, judged on rows that the fit has not seen.

Transfer: the same fit to all rows of one model, judged on the other; to 1 and 2 shards, judged on 4 and 8.

Links: all rows of a collective are fitted with two constants; errors are of the fit itself, not held out.

Layers: the table's g4dn.12xlarge against SpotServe's measured layers on T4. These are no held-out rows: the constants of the device
and of the link between devices were fitted to rows of 1, 2 and 4 shards, and the latency of the network (8 shards are two
machines) was set with rows of 8 and 16 shards in view; its bandwidth is the line's.
"""

import argparse
import csv
import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from spotserve.core.cut import held_bytes
from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.planner.calibration import LinkSample, Sample, fit_device, fit_link, predicted_s
from spotserve.planner.chunks import num_pairs
from spotserve.planner.collectives import all_reduce_s
from spotserve.planner.devices import device_type, instance_type
from spotserve.planner.models import named_model
from spotserve.planner.shards import layer_step_s

GPUS = ("a100", "a40")
MODELS = ("7b", "70b")
FOLDS = 4
OPERATORS = ("input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "add", "post_attention_layernorm", "mlp_up_proj",
             "mlp_act", "mlp_down_proj", "add")  # fmt: skip
"""Of a decoder layer, in order; the residual is added twice."""
SPOTSERVE = {"opt-6.7b": "megatron_6.7B", "gpt-20b": "megatron_h6144", "llama-30b": "megatron_h7168"}
GOAL = (0.10, 0.25)
"""Mean and 95th percentile of the relative error."""


def data_folder() -> Path:
    """Where the data should be."""
    return Path(os.environ.get("SPOTSERVE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def layer_samples(folder: Path, gpu: str, size: str, tensors: Collection[int] = (1, 2, 4, 8)) -> list[Sample]:
    """Every row of a profile of Vidur's with one of these numbers of shards: one decoder layer on one shard."""
    model = named_model(f"llama-2-{size}")
    samples = []
    for row in _rows(folder / "profiles" / "vidur" / f"llama2-{size}_{gpu}.csv"):
        tensor, tokens = int(row["num_tensor_parallel_workers"]), int(row["num_tokens"])
        if tensor not in tensors:
            continue
        num_bytes = held_bytes(model.layer, tensor, 0)
        flops = tokens * model.layer_flops_per_token * num_bytes / model.layer_bytes
        seconds = sum(float(row[f"time_stats.{operator}.median"]) for operator in OPERATORS) / 1e3
        samples.append(Sample(flops=flops, num_bytes=num_bytes, num_layers=1, seconds=seconds))
    return samples


def judge_devices(folder: Path, seed: int) -> dict[str, Any]:
    """Held-out errors by GPU, model and fold, and the constants of each fit."""
    report: dict[str, Any] = {}
    for gpu in GPUS:
        samples = {size: layer_samples(folder, gpu, size) for size in MODELS}
        order = {size: np.random.default_rng(seed).permutation(len(samples[size])) for size in MODELS}
        quarters = {size: [[samples[size][row] for row in part] for part in np.array_split(order[size], FOLDS)] for size in MODELS}
        errors: dict[str, list[Any]] = {size: [] for size in MODELS}
        constants = []
        for fold in range(FOLDS):
            seen = [sample for size in MODELS for part in range(FOLDS) if part != fold for sample in quarters[size][part]]
            start_s = time.perf_counter()
            device = fit_device(seen, device_type("T4"))
            fit_s = time.perf_counter() - start_s
            constants.append([device.flops_per_s, device.memory_bytes_per_s, device.layer_overhead_s, fit_s])
            for size in MODELS:
                errors[size].append(_relative(quarters[size][fold], device))
        report[gpu] = {
            "folds": {size: [_errors(each) for each in errors[size]] for size in MODELS},
            "models": {size: _errors(np.concatenate(errors[size])) for size in MODELS},
            "all": _errors(np.concatenate([each for size in MODELS for each in errors[size]])),
            "constants": constants,
        }
    return report


def judge_transfer(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Errors on what is quite unlike all that the fit has seen: the other model, or shards four times as thin."""
    report = {}
    for gpu in GPUS:
        small, large = (layer_samples(folder, gpu, size) for size in MODELS)
        thick, thin = ([each for size in MODELS for each in layer_samples(folder, gpu, size, part)] for part in ((1, 2), (4, 8)))
        cases = {"7b, then 70b": (small, large), "70b, then 7b": (large, small), "1 and 2 shards, then 4 and 8": (thick, thin)}
        report[gpu] = {
            name: _errors(_relative(unseen, fit_device(seen, device_type("T4")))) for name, (seen, unseen) in cases.items()
        }
    return report


def _relative(samples: list[Sample], device: DeviceType) -> Any:
    """Relative error of every sample."""
    return np.abs(predicted_s(samples, device) / np.array([sample.seconds for sample in samples]) - 1)


def judge_links(folder: Path) -> list[dict[str, Any]]:
    """Errors of fits of collectives, by file and by where the devices are."""
    vidur = folder / "profiles" / "vidur"
    cases: list[tuple[str, str, str, Callable[[int, int], bool]]] = [
        ("A100 DGX, 2, 4, 8 devices", "a100_dgx_all_reduce.csv", "all_reduce", lambda workers, here: workers == here),
        ("A100 pairwise NVLink, 2 devices", "a100_pairwise_nvlink_all_reduce.csv", "all_reduce", lambda workers, _: workers == 2),
        ("A100 pairwise NVLink, 4 devices", "a100_pairwise_nvlink_all_reduce.csv", "all_reduce", lambda workers, _: workers == 4),
        ("two A100 DGX, 1 device each", "a100_dgx_all_reduce.csv", "all_reduce", lambda workers, here: (workers, here) == (2, 1)),
        ("A100 DGX, 1 to 1", "a100_dgx_send_recv.csv", "send_recv", lambda _, here: here == 2),
        ("two A100 DGX, 1 to 1", "a100_dgx_send_recv.csv", "send_recv", lambda _, here: here == 1),
    ]
    report = []
    for name, file, collective, wanted in cases:
        samples = list(_link_samples(vidur / file, collective, wanted))
        link = fit_link(samples, Link(50e-6, 10e9))
        predicted = np.array([each.num_messages * link.latency_s + each.num_bytes / link.bytes_per_s for each in samples])
        error = np.abs(predicted / np.array([each.seconds for each in samples]) - 1)
        report.append(
            {"name": f"{collective}: {name}", "latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s, **_errors(error)}
        )
    return report


def _link_samples(path: Path, collective: str, wanted: Callable[[int, int], bool]) -> Iterator[LinkSample]:
    """Rows of a collective, with the messages and bytes that `collectives` says it has."""
    for row in _rows(path):
        workers, here, size = int(row["num_workers"]), int(row["devices_per_node"]), int(row["size"])
        if not wanted(workers, here):
            continue
        messages, num_bytes = (1.0, float(size)) if collective == "send_recv" else _all_reduce(size, workers)
        yield LinkSample(num_bytes, float(row[f"time_stats.{collective}.median"]) / 1e3, messages)


def _all_reduce(size: int, workers: int) -> tuple[float, float]:
    """Messages and bytes through one port of an all-reduce within a machine, read off the cost model itself."""
    counting = _with_link(Link(1.0, 1e30), workers)
    weighing = _with_link(Link(0.0, 1.0), workers)
    return all_reduce_s(size, workers, counting), all_reduce_s(size, workers, weighing)


def _with_link(link: Link, devices: int) -> InstanceType:
    return InstanceType(
        name="any",
        device=device_type("T4"),
        num_devices=devices,
        device_link=link,
        network=link,
        host_memory_bytes=0,
        host_link=link,
    )


def judge_layers(folder: Path) -> dict[str, dict[str, float]]:
    """Errors of the table's g4dn.12xlarge against SpotServe's layers, by number of shards: 512-token prompts and decode steps."""
    hardware = instance_type("g4dn.12xlarge", value_bytes=4)
    errors: dict[str, list[float]] = {}
    for name, file in SPOTSERVE.items():
        model = named_model(name)
        profile = json.loads((folder / "profiles" / "spotserve" / "T4-4x" / f"{file}_profile.json").read_text())
        for tensor in (1, 2, 4, 8):
            for key, measured in profile[f"tp-{tensor}"].items():
                batch = int(key.removeprefix("bsz-"))
                prompts = {"tokens": 512 * batch, "pairs": batch * num_pairs(512, 0), "kv_tokens": 0}
                step = {"tokens": batch, "pairs": batch * 576, "kv_tokens": batch * 576}
                for kind, load in (("init", prompts), ("incr", step)):
                    predicted = layer_step_s(model, tensor, hardware, **load)
                    errors.setdefault(f"{tensor} {kind}", []).append(abs(predicted / (measured[kind] / 1e3) - 1))
    return {key: _errors(np.array(values)) for key, values in errors.items()}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _errors(errors: Any) -> dict[str, float]:
    return {"mean": float(np.mean(errors)), "p95": float(np.quantile(errors, 0.95)), "rows": len(errors)}


def _print(report: dict[str, Any]) -> None:
    console = Console()
    table = Table("GPU", "model", *(f"fold {fold}" for fold in range(FOLDS)), "all folds", title="held-out error, mean / p95")
    for gpu, result in report["devices"].items():
        for size in MODELS:
            table.add_row(gpu, size, *(_both(each) for each in result["folds"][size]), _both(result["models"][size]))
        table.add_row(gpu, "both", *("" for _ in range(FOLDS)), _both(result["all"]))
    console.print(table)
    table = Table("GPU", "fold", "TFLOPS", "GB/s", "overhead", "time of the fit", title="three constants per GPU")
    for gpu, result in report["devices"].items():
        for fold, (flops, num_bytes, overhead, fit_s) in enumerate(result["constants"]):
            row = (f"{flops / 1e12:.1f}", f"{num_bytes / 1e9:.0f}", f"{overhead * 1e6:.1f} us", f"{fit_s * 1e3:.0f} ms")
            table.add_row(gpu, str(fold), *row)
    console.print(table)
    table = Table("GPU", *report["transfer"][GPUS[0]], title="fitted to one thing, judged on another, mean / p95")
    for gpu, cases in report["transfer"].items():
        table.add_row(gpu, *(_both(errors) for errors in cases.values()))
    console.print(table)
    table = Table(
        "collective", "latency of a message", "GB/s", "error of the fit, mean / p95", "rows", title="two constants per link"
    )
    for each in report["links"]:
        speed = (f"{each['latency_s'] * 1e6:.1f} us", f"{each['bytes_per_s'] / 1e9:.1f}")
        table.add_row(each["name"], *speed, _both(each), str(each["rows"]))
    console.print(table)
    table = Table("shards", "prompts of 512 tokens", "decode steps", title="layers of SpotServe's models on T4, mean / p95 error")
    for tensor in (1, 2, 4, 8):
        table.add_row(str(tensor), *(_both(report["layers"][f"{tensor} {kind}"]) for kind in ("init", "incr")))
    console.print(table)


def _both(errors: dict[str, float]) -> str:
    return f"{errors['mean']:.1%} / {errors['p95']:.1%}"


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder of the data; default: SPOTSERVE_DATA")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    if not (args.data / "profiles" / "vidur").is_dir():
        parser.error(f"{args.data}: there is no folder profiles/vidur in it")
    report = {
        "devices": judge_devices(args.data, args.seed),
        "transfer": judge_transfer(args.data),
        "links": judge_links(args.data),
        "layers": judge_layers(args.data),
        "goal": {"mean": GOAL[0], "p95": GOAL[1]},
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


if __name__ == "__main__":
    main()
