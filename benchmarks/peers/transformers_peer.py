"""transformers: `generate` on one static batch, or its continuous batching on paged SDPA (`--further '{"continuous": true}'`)."""

import json
import logging
from time import perf_counter

import torch
import transformers
from loop import Round, TokenTimes, answer_rounds, peer_arguments
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


def start() -> tuple[str, Round]:
    """Loads the model."""
    arguments = peer_arguments()
    continuous = bool(json.loads(arguments.further).get("continuous"))
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, attn_implementation="sdpa").eval()
    if continuous:
        return f"{transformers.__version__}, continuous", _continuous(model, arguments.max_batch)
    return f"{transformers.__version__}, generate", lambda prompts, new_tokens: _generate(model, prompts, new_tokens)


def _generate(model: torch.nn.Module, prompts: list[list[int]], new_tokens: int) -> TokenTimes:
    """All tokens of a step come at once: each step is timed when its logits are there, as streamers take no batch."""
    ids = torch.tensor(prompts)
    steps_s: list[float] = []

    def note(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        steps_s.append(perf_counter() - started_s)
        return scores

    started_s = perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=transformers.LogitsProcessorList([note]),
        )
    assert output.shape[1] == ids.shape[1] + new_tokens
    return [steps_s for _ in prompts]


def _continuous(model: torch.nn.Module, max_batch: int) -> Round:
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it warns of the reuse that is meant here
    batching = ContinuousBatchingConfig(
        num_blocks=max(256, max_batch * 8), page_size=32, max_batch_tokens=256, max_requests_per_batch=max_batch
    )

    def run(prompts: list[list[int]], new_tokens: int) -> TokenTimes:
        """It tells when a request was created and ended, and when each token came."""
        generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        started_s = perf_counter()
        with torch.inference_mode():
            outputs = model.generate_batch(
                prompts, generation, batching, persistent_manager=True, warmup=False, record_timestamps=True
            )
        ended_s = perf_counter() - started_s
        times = []
        for output in outputs.values():
            assert len(output.generated_tokens) == new_tokens
            stamps = list(output.timestamps or [])
            # Its clock is the same monotonic one; where it kept no stamps, only the end is known.
            times.append([at - started_s for at in stamps] if len(stamps) == new_tokens else [ended_s] * new_tokens)
        return times

    return run


if __name__ == "__main__":
    answer_rounds(start)
