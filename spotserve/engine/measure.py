"""How fast one device of this machine computes, measured in about a second: what the planner's three constants are fitted to.

Steps of the model that ships, run by the engine as any other: one sequence, several, whole prompts. They say what a layer costs
however little it computes, and how fast small weights stream. Two kernels at sizes that a small model does not have pin the
rates of large ones: a matrix product, and reading memory that no cache holds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch

from spotserve.config import DEMO_MODEL, EngineSettings
from spotserve.core.model import ModelSpec
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.bring_up import lone_engine
from spotserve.engine.device import PROCESSOR, device_of
from spotserve.engine.dtypes import DTYPES
from spotserve.engine.engine import Engine
from spotserve.engine.linear import linear_map
from spotserve.engine.results import StepResult

PROMPT_TOKENS = 128
NEW_TOKENS = 32
SEQUENCES = (1, 4, 16)
PRODUCT = (256, 1024, 4096)
"""Rows, inputs and outputs of the large matrix product."""
STREAMED_BYTES = 64 * 2**20
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """One piece of work, and how long it took."""

    flops: float
    num_bytes: float
    num_layers: int
    """Decoder layers that it went through; 0: it was a lone kernel."""
    seconds: float


def measure(settings: EngineSettings) -> tuple[Measured, ...]:
    """Measures this process's device with the dtype and the threads of `settings`. Takes about a second.

    Raises:
        ModelError: the model that ships cannot be run.
    """
    small = settings.model_copy(
        update={
            "kind": "native",
            "model": str(DEMO_MODEL),
            "speculation": "off",
            "prefix_cache": False,
            "kv_tokens": 4096,
            "max_batch": max(SEQUENCES),
            "max_step_tokens": PROMPT_TOKENS,
        }
    )
    engine = lone_engine(small)
    tuple(_loop(engine, SEQUENCES[0]))  # warms up
    steps = [each for count in SEQUENCES for each in _loop(engine, count)]
    return (*steps, *_kernels(DTYPES[settings.dtype], device_of(settings)))


def _loop(engine: Engine, count: int) -> Iterator[Measured]:
    """A prompt and then tokens for so many sequences: the quickest step of each kind."""
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    for index in range(count):
        prompt = tuple((17 + 131 * index + 7 * place * place) % engine.spec.vocabulary_size for place in range(PROMPT_TOKENS))
        engine.add(Request(request_id=f"measure-{count}-{index}", prompt_token_ids=prompt, sampling=sampling))
    results: list[StepResult] = []
    while engine.has_work:
        results.append(engine.step())
    prompts = [result for result in results if result.num_prefill_tokens == PROMPT_TOKENS and result.num_decode_tokens == 0]
    tokens = [result for result in results if result.num_prefill_tokens == 0 and result.num_decode_tokens == count]
    if prompts:
        pairs = PROMPT_TOKENS**2 / 2
        seconds = min(result.step_s for result in prompts)
        yield _step(engine.spec, PROMPT_TOKENS, sampled=1, pairs=pairs, kv_tokens=PROMPT_TOKENS, seconds=seconds)
    context = count * (PROMPT_TOKENS + NEW_TOKENS / 2)
    seconds = min(result.step_s for result in tokens)
    yield _step(engine.spec, count, sampled=count, pairs=context, kv_tokens=context, seconds=seconds)


def _step(spec: ModelSpec, tokens: int, *, sampled: int, pairs: float, kv_tokens: float, seconds: float) -> Measured:
    """A step of `tokens` tokens, of which `sampled` get a next one, with so many pairs of a token and one that it attends to, and
    with so many tokens of KV to read."""
    attention = 4 * spec.num_heads * spec.head_size * pairs * spec.num_layers
    flops = tokens * spec.num_layers * spec.layer_flops_per_token + sampled * spec.head_flops_per_token + attention
    num_bytes = spec.num_layers * spec.layer_bytes + spec.head_bytes + kv_tokens * spec.kv_bytes_per_token
    return Measured(flops, num_bytes, spec.num_layers, seconds)


def _kernels(dtype: torch.dtype, device: torch.device) -> tuple[Measured, Measured]:
    rows, inputs, outputs = PRODUCT
    with torch.inference_mode():
        product = linear_map(torch.ones(outputs, inputs, dtype=dtype, device=device), None)
        hidden = torch.ones(rows, inputs, dtype=dtype, device=device)
        product_s = _seconds(lambda: product(hidden), device)
        streamed = torch.ones(STREAMED_BYTES // 4, dtype=torch.float32, device=device)
        stream_s = _seconds(streamed.sum, device)
    moved = (rows * inputs + inputs * outputs + rows * outputs) * dtype.itemsize
    return Measured(2.0 * rows * inputs * outputs, moved, 0, product_s), Measured(0.0, STREAMED_BYTES, 0, stream_s)


def _seconds(work: Callable[[], object], device: torch.device = PROCESSOR) -> float:
    """The quickest of several runs: whatever else this machine does only adds."""
    times = []
    for _ in range(REPEATS + 1):
        started_s = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - started_s)
    return min(times[1:])
