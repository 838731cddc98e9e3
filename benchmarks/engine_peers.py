"""Output tokens per second of this engine and of what ships with transformers, in one run on the same weights.

    python benchmarks/engine_peers.py --threads 2 --concurrency 1 8 32

Peers: `generate` (one static batch, left-padded) and continuous batching (`generate_batch` on paged SDPA), both greedy with
end-of-text ignored. Repeats are interleaved (every system once, then every system again), medians are compared, so that whatever
else the machine does falls on all alike. Without `--model` the weights are random, of the demo model's shape: speed does not
depend on them, but what prompt lookup gains does (random weights loop, which flatters it).
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from spotserve.config import EngineSettings
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.engine import Engine

SNIPPETS = (
    "def add(left, right):\n    return left + right\n\n\ndef subtract(left, right):\n    return left - right\n",
    "for index, row in enumerate(rows):\n    if not row:\n        continue\n    total += row.value * weights[index]\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items += [item]\n",
    "try:\n    with open(path) as file:\n        return json.load(file)\nexcept FileNotFoundError:\n    return {}\n",
    "import argparse\n\nparser = argparse.ArgumentParser()\nparser.add_argument('--name', default='world')\n",
    "SELECT name, count(*) FROM visits JOIN users ON users.id = visits.user_id GROUP BY name ORDER BY 2 DESC;\n",
)
Run = Callable[[list[list[int]]], float]


def prompts(count: int, vocabulary_size: int) -> list[list[int]]:
    """Code-like prompts of 50 to 150 tokens: bytes as ids, so that no tokenizer is needed."""
    return [[byte % vocabulary_size for byte in (f"# task {i}\n" + SNIPPETS[i % len(SNIPPETS)]).encode()] for i in range(count)]


def demo_shape(folder: Path) -> None:
    """Random weights of the demo model's shape."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.05,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)


def engine_run(engine: Engine, new_tokens: int) -> Run:
    """This engine."""

    def run(batch: list[list[int]]) -> float:
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        started_s = perf_counter()
        for index, prompt in enumerate(batch):
            engine.add(Request(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling))
        produced = 0
        while engine.has_work:
            produced += sum(len(output.token_ids) for output in engine.step().outputs)
        assert produced == new_tokens * len(batch)
        return produced / (perf_counter() - started_s)

    return run


def generate_run(folder: str, new_tokens: int) -> Run:
    """transformers `generate`: one static batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(batch: list[list[int]]) -> float:
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        started_s = perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert output.shape == (len(batch), width + new_tokens)
        return new_tokens * len(batch) / (perf_counter() - started_s)

    return run


def continuous_run(folder: str, new_tokens: int) -> Run:
    """transformers continuous batching with a cache large enough for all."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it warns of the reuse that is meant here
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=1024, page_size=32, max_batch_tokens=256, max_requests_per_batch=64)

    def run(batch: list[list[int]]) -> float:
        started_s = perf_counter()
        with torch.inference_mode():
            outputs = model.generate_batch(batch, generation, batching, persistent_manager=True, warmup=False)
        assert all(len(output.generated_tokens) == new_tokens for output in outputs.values()) and len(outputs) == len(batch)
        return new_tokens * len(batch) / (perf_counter() - started_s)

    return run


def measure(systems: dict[str, Run], concurrency: int, *, vocabulary_size: int, repeats: int) -> dict[str, float]:
    """Median tokens/s per system, after one warm-up each."""
    batch = prompts(concurrency, vocabulary_size)
    for run in systems.values():
        run(batch)
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, run in systems.items():
            rates[name].append(run(batch))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="This engine beside transformers' own two, tokens/s")
    parser.add_argument("--model", help="folder in Hugging Face format; default: random weights of the demo shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-continuous", action="store_true", help="leave out transformers' continuous batching")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or scratch
        if arguments.model is None:
            demo_shape(Path(scratch))
        engines = {
            name: Engine(EngineSettings(model=folder, threads=arguments.threads, speculation=speculation))
            for name, speculation in (("spotserve", "off"), ("spotserve ngram:4", "ngram:4"), ("spotserve adaptive", "adaptive"))
        }
        systems = {name: engine_run(engine, arguments.new_tokens) for name, engine in engines.items()}
        systems["generate"] = generate_run(folder, arguments.new_tokens)
        if not arguments.without_continuous:
            systems["continuous"] = continuous_run(folder, arguments.new_tokens)
        vocabulary_size = engines["spotserve"].spec.vocabulary_size
        figures = {
            concurrency: measure(systems, concurrency, vocabulary_size=vocabulary_size, repeats=arguments.repeats)
            for concurrency in arguments.concurrency
        }
    print_table(figures)
    if arguments.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        result = {"arguments": sys.argv[1:], **machine, "tokens_per_s": figures}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def print_table(figures: dict[int, dict[str, float]]) -> None:
    """Tokens/s, and this engine without speculation over the better peer."""
    names = list(next(iter(figures.values())))
    print(f"{'tokens/s at':>12}" + "".join(f"{name:>20}" for name in names) + f"{'over best peer':>18}")
    for concurrency, rates in figures.items():
        best_peer = max(rate for name, rate in rates.items() if not name.startswith("spotserve"))
        columns = "".join(f"{rates[name]:>20.0f}" for name in names)
        print(f"{concurrency:>12}" + columns + f"{rates['spotserve'] / best_peer:>17.2f}x")


if __name__ == "__main__":
    main()
