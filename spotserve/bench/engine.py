"""How fast one replica computes on this machine: output tokens per second, waits, and the share of the memory's bandwidth.

    python -m spotserve.bench.engine --threads 2 --concurrency 1,4,16,64 --json

A round is a closed loop in which every client has one request: all are submitted at once and answered greedily, to a fixed number
of tokens. The bandwidth is measured in the same process and with the same threads, by adding up as many bytes as the weights
have: at one client a step does little else than read them.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

import msgspec
import torch
from pydantic import ValidationError

from spotserve.config import EngineSettings
from spotserve.core.model import ModelSpec
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.bring_up import lone_engine
from spotserve.engine.engine import Engine

PROMPT_TOKENS = 64
TokenTimes = list[list[float]]
"""Of each request, when each of its output tokens came: seconds since the round began."""


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """What clients see at one concurrency: medians over rounds, percentiles over all requests."""

    concurrency: int
    output_tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """One engine."""

    model: str
    dtype: str
    threads: int
    weights_bytes: int
    """Read by every step."""
    bandwidth_bytes_per_s: float
    bandwidth_share: float | None
    """Of what reading the weights alone would allow, at one client; None when that was not measured."""
    points: tuple[LoopFigures, ...]


def prompts(count: int, vocabulary_size: int) -> list[list[int]]:
    """Prompts that begin differently."""
    return [[(17 + index * 131 + place * place * 7) % vocabulary_size for place in range(PROMPT_TOKENS)] for index in range(count)]


def run_round(engine: Engine, token_ids: Sequence[Sequence[int]], new_tokens: int) -> TokenTimes:
    """One closed loop."""
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    times: TokenTimes = [[] for _ in token_ids]
    started_s = perf_counter()
    for index, prompt in enumerate(token_ids):
        engine.add(Request(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling))
    while engine.has_work:
        outputs = engine.step().outputs
        now_s = perf_counter() - started_s
        for output in outputs:
            times[int(output.request_id)].extend([now_s] * len(output.token_ids))
    return times


def loop_figures(rounds: Sequence[TokenTimes]) -> LoopFigures:
    """Of rounds at the same concurrency, each of two tokens per request at least."""
    rates = [sum(map(len, times)) / max(of_request[-1] for of_request in times) for times in rounds]
    requests = [of_request for times in rounds for of_request in times]
    first = sorted(of_request[0] for of_request in requests)
    between = sorted((of_request[-1] - of_request[0]) / (len(of_request) - 1) for of_request in requests)
    return LoopFigures(
        concurrency=len(rounds[0]),
        output_tokens_per_s=statistics.median(rates),
        ttft_p50_s=_percentile(first, 0.5),
        ttft_p99_s=_percentile(first, 0.99),
        tpot_p50_s=_percentile(between, 0.5),
        tpot_p99_s=_percentile(between, 0.99),
    )


def _percentile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]


def weights_bytes(spec: ModelSpec) -> int:
    """What a decode step reads: layers and head; of the embedding it reads a row per token."""
    return spec.num_layers * sum(part.num_bytes for part in spec.layer) + sum(part.num_bytes for part in spec.head)


def read_bandwidth_bytes_per_s(num_bytes: int, *, repeats: int = 7) -> float:
    """The best of `repeats` sums over that many bytes, with torch's threads."""
    values = torch.ones(max(1, num_bytes // 4), dtype=torch.float32)
    values.sum()
    best_s = float("inf")
    for _ in range(repeats):
        started_s = perf_counter()
        values.sum()
        best_s = min(best_s, perf_counter() - started_s)
    return values.nbytes / best_s


def measure(settings: EngineSettings, *, concurrency: Sequence[int], rounds: int, new_tokens: int) -> EngineFigures:
    """Warms up, then measures each concurrency in turn, `rounds` times.

    Raises:
        ModelError: the model cannot be read or computed.
    """
    engine = lone_engine(settings)
    batches = {count: prompts(count, engine.spec.vocabulary_size) for count in concurrency}
    found: dict[int, list[TokenTimes]] = {count: [] for count in concurrency}
    for count in concurrency:
        run_round(engine, batches[count], 2)
    for _ in range(rounds):
        for count in concurrency:
            found[count].append(run_round(engine, batches[count], new_tokens))
    points = tuple(loop_figures(found[count]) for count in concurrency)
    num_bytes = weights_bytes(engine.spec)
    bandwidth = read_bandwidth_bytes_per_s(num_bytes)
    lone = next((point for point in points if point.concurrency == 1), None)
    return EngineFigures(
        model=settings.model_name,
        dtype=settings.dtype,
        threads=settings.threads,
        weights_bytes=num_bytes,
        bandwidth_bytes_per_s=bandwidth,
        bandwidth_share=None if lone is None else num_bytes / lone.tpot_p50_s / bandwidth,
        points=points,
    )


def _settings_for(arguments: argparse.Namespace) -> EngineSettings:
    """An engine with room for the widest loop, that keeps no prefixes and drafts nothing."""
    widest = max(arguments.concurrency)
    given = {name: value for name in ("model", "dtype", "invariant", "quantization") if (value := getattr(arguments, name))}
    return EngineSettings(
        **given,
        threads=arguments.threads,
        max_batch=widest,
        max_step_tokens=max(256, widest),
        kv_tokens=max(4096, widest * (PROMPT_TOKENS + arguments.new_tokens + 32)),
        prefix_cache=False,
        speculation="off",
    )


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spotserve bench engine", description="How fast one replica computes on this machine")
    parser.add_argument("--model", help="a folder in Hugging Face format, or a hub id; default: the model that ships")
    parser.add_argument("--dtype", help="float32 (the default), bfloat16, float16 or float64")
    parser.add_argument("--threads", type=int, default=1, help="compute threads")
    parser.add_argument("--invariant", choices=("batch", "full"), help="what logits do not depend on, to the last bit")
    parser.add_argument("--quantization", choices=("none", "int8"), help="of the weights of linear layers")
    parser.add_argument("--concurrency", type=_counts, default=(1, 4, 16, 64), help="clients of each closed loop: 1,4,16,64")
    parser.add_argument("--new-tokens", type=int, default=64, help="output tokens of each request, 2 at least")
    parser.add_argument("--rounds", type=int, default=3, help="repeats of each loop")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main() -> None:
    """Measures and prints."""
    arguments = _parser().parse_args()
    try:
        settings = _settings_for(arguments)
    except ValidationError as error:
        raise SystemExit(f"error: {error}") from error
    figures = measure(settings, concurrency=arguments.concurrency, rounds=arguments.rounds, new_tokens=arguments.new_tokens)
    if arguments.json:
        print(msgspec.json.encode(asdict(figures)).decode())
        return
    print(f"{figures.model}, {figures.dtype}, {figures.threads} threads, {figures.weights_bytes / 1e6:.0f} MB of weights")
    print(f"{'clients':>8}{'tokens/s':>10}{'TTFT ms p50':>13}{'p99':>8}{'TPOT ms p50':>13}{'p99':>8}")
    for point in figures.points:
        waits = (point.ttft_p50_s, point.ttft_p99_s, point.tpot_p50_s, point.tpot_p99_s)
        print(
            f"{point.concurrency:>8}{point.output_tokens_per_s:>10.0f}"
            + "{:>13.1f}{:>8.1f}{:>13.2f}{:>8.2f}".format(*(1e3 * s for s in waits))
        )
    share = "" if figures.bandwidth_share is None else f"; one client reaches {figures.bandwidth_share:.0%} of it"
    print(f"reading that many bytes: {figures.bandwidth_bytes_per_s / 1e9:.0f} GB/s{share}")


if __name__ == "__main__":
    main()
