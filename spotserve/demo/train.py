"""Trains the target and draft models that ship, from the standard library's sources, on an ordinary CPU.

    python -m spotserve.demo.train tokenizer --out DIR
    python -m spotserve.demo.train target --out DIR --tokenizer DIR --minutes 70
    python -m spotserve.demo.train draft --out DIR --tokenizer DIR --minutes 15

Matrices inside the layers are trained with Muon and everything else with AdamW: at this size and budget AdamW alone leaves
the target worse than its draft. Forward and backward run in bfloat16, the optimizers in float32. The learning rate follows
the share of the time budget that is spent (short warm-up, plateau, linear decay to zero), so a run ends on time on any machine.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spotserve.demo.corpus import read_pairs, read_texts

VOCABULARY_SIZE = 4096
CONTEXT_TOKENS = 1024
BATCH_ROWS = 4
PLATEAU_SHARE = 0.5
WARM_UP_STEPS = 50
MUON_LEARNING_RATE = 0.02
ADAMW_LEARNING_RATE = 0.003

BEGIN, END, PAD, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [BEGIN, END, PAD, SYSTEM, USER, ASSISTANT]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SHAPES = {
    "target": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "draft": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a run did: written beside the weights as `training.json`. Losses are nats per token."""

    parameters: int
    tokens_seen: int
    steps: int
    minutes: float
    threads: int
    final_training_loss: float
    held_out_loss: float
    held_out_tokens: int


def train_tokenizer(out: Path) -> None:
    """Learns a byte-level BPE vocabulary from the training side of the split and saves it with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(read_texts(held_out=False), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = CONTEXT_TOKENS
    fast.save_pretrained(out)


def encode_documents(tokenizer: PreTrainedTokenizerFast, *, held_out: bool) -> list[list[int]]:
    """Token ids of every document of one side: files as they are, and each docstring with its function as a chat."""
    texts = list(read_texts(held_out=held_out))
    documents = [BEGIN + text + END for text in texts]
    documents += [f"{BEGIN}{USER}{pair.question}{END}{ASSISTANT}{pair.answer}{END}" for text in texts for pair in read_pairs(text)]
    return [list(ids) for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]]


class Batches:
    """Shuffled documents laid end to end and cut into rows; a new shuffle each time they run out."""

    def __init__(self, documents: list[list[int]], *, seed: int) -> None:
        self._documents = documents
        self._random = random.Random(seed)
        self._stream = torch.empty(0, dtype=torch.long)
        self._position = 0

    def draw(self) -> torch.Tensor:
        """The next batch, [BATCH_ROWS, CONTEXT_TOKENS + 1]."""
        needed = BATCH_ROWS * CONTEXT_TOKENS + 1
        if self._position + needed > self._stream.numel():
            self._random.shuffle(self._documents)
            self._stream = torch.tensor([token for document in self._documents for token in document])
            self._position = 0
        piece = self._stream[self._position : self._position + needed]
        self._position += needed - 1
        return torch.stack([piece[row * CONTEXT_TOKENS : (row + 1) * CONTEXT_TOKENS + 1] for row in range(BATCH_ROWS)])


def batch_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of `batch` [rows, context + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1]).logits  # [rows, context, vocabulary]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: list[list[int]], *, batches: int = 23) -> float:
    """Mean loss over the first `batches` batches of the held-out stream, in a fixed order."""
    model.eval()
    source = Batches(documents, seed=0)
    losses = [batch_loss(model, source.draw()).item() for _ in range(batches)]
    model.train()
    return sum(losses) / len(losses)


def learning_rate_share(spent_share: float, step: int) -> float:
    """Warm-up, plateau, linear decay: the factor on both learning rates after `spent_share` of the time budget."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    decay = min(1.0, max(0.0, (1.0 - spent_share) / (1.0 - PLATEAU_SHARE)))
    return warm_up * decay


def train_model(kind: str, tokenizer_dir: Path, out: Path, *, minutes: float, threads: int, seed: int) -> TrainingReport:
    """Trains one of SHAPES for `minutes` and saves it as bfloat16 safetensors beside its tokenizer and report."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    training, held_out = (encode_documents(tokenizer, held_out=side) for side in (False, True))
    print(f"{sum(map(len, training)):,} training tokens, {sum(map(len, held_out)):,} held out", flush=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[kind],
    )
    model = LlamaForCausalLM(config)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batches = Batches(training, seed=seed)
    started_s = time.monotonic()
    step, recent = 0, 0.0
    while (spent_share := (time.monotonic() - started_s) / (60 * minutes)) < 1.0:
        loss = batch_loss(model, batches.draw())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_share(spent_share, step)
            optimizer.step()
            optimizer.zero_grad()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{spent_share:6.1%} step {step:6d} loss {recent:.3f}", flush=True)
        step += 1
    report = TrainingReport(
        parameters=sum(p.numel() for p in model.parameters()),
        tokens_seen=step * BATCH_ROWS * CONTEXT_TOKENS,
        steps=step,
        minutes=round((time.monotonic() - started_s) / 60, 1),
        threads=threads,
        final_training_loss=round(recent, 4),
        held_out_loss=round(held_out_loss(model, held_out), 4),
        held_out_tokens=23 * BATCH_ROWS * CONTEXT_TOKENS,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def main() -> None:
    """Command line of the three steps above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenizer", *SHAPES])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (for target and draft)")
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.what == "tokenizer":
        train_tokenizer(arguments.out)
        return
    if arguments.tokenizer is None:
        parser.error("--tokenizer DIR is needed to train a model")
    budget = {"minutes": arguments.minutes, "threads": arguments.threads, "seed": arguments.seed}
    report = train_model(arguments.what, arguments.tokenizer, arguments.out, **budget)
    print(json.dumps(asdict(report), indent=2))


if __name__ == "__main__":
    main()
