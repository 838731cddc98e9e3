"""Measures the models that ship, on text that neither was trained on.

    python -m spotserve.demo.measure

Prints the held-out loss of target and draft, and how much each drafter is worth when it proposes K tokens per step: the share
of its tokens that the target accepts, and the tokens that one step of the target yields. Greedy, over the target's own
continuations of held-out files: what a drafter meets when it serves.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spotserve.config import DEMO_MODEL
from spotserve.demo.train import encode_documents, held_out_loss
from spotserve.speculation.drafter import DraftTask
from spotserve.speculation.drafters.ngram import NgramDrafter

DEMO_DRAFT = DEMO_MODEL.parent / "draft"
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class DrafterWorth:
    """What one drafter is worth at K tokens per step."""

    drafter: str
    draft_tokens: int
    acceptance: float
    """Accepted tokens per token drafted."""
    tokens_per_step: float
    """Accepted tokens and the target's own one, per step of the target."""


@torch.inference_mode()
def continue_greedily(model: LlamaForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    """The model's most probable continuation of `prompt`, token by token."""
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, num_beams=1
    )
    return [int(token) for token in output[0, len(prompt) :]]


@torch.inference_mode()
def model_proposals(draft: LlamaForCausalLM, tokens: list[int], start: int, draft_tokens: int) -> list[list[int]]:
    """For every position from `start`: the draft's greedy continuation of all before it, `draft_tokens` long."""
    positions = range(start, len(tokens) - draft_tokens)
    return [continue_greedily(draft, tokens[:position], draft_tokens) for position in positions]


def ngram_proposals(tokens: list[int], start: int, draft_tokens: int) -> list[list[int]]:
    """The same for prompt lookup."""
    drafter = NgramDrafter()
    proposals = []
    for position in range(start, len(tokens) - draft_tokens):
        (draft,) = drafter.propose([DraftTask("measured", tokens[:position], draft_tokens)])
        proposals.append(list(draft.tree.token_ids))
    return proposals


def play(tokens: list[int], start: int, proposals: list[list[int]]) -> tuple[int, int, int]:
    """Steps, drafted and accepted tokens of a speculative run over a known continuation."""
    position, steps, drafted, accepted = start, 0, 0, 0
    while position - start < len(proposals):
        proposal = proposals[position - start]
        kept = 0
        while kept < len(proposal) and proposal[kept] == tokens[position + kept]:
            kept += 1
        steps, drafted, accepted = steps + 1, drafted + len(proposal), accepted + kept
        position += kept + 1
    return steps, drafted, accepted


def main() -> None:
    """Prints the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--texts", type=int, default=16, help="held-out files to continue")
    parser.add_argument("--target", type=Path, default=DEMO_MODEL)
    parser.add_argument("--draft", type=Path, default=DEMO_DRAFT)
    arguments = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.target)
    target, draft = (LlamaForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (arguments.target, arguments.draft))
    documents = encode_documents(tokenizer, held_out=True)
    losses = {name: round(held_out_loss(model, documents), 4) for name, model in (("target", target), ("draft", draft))}
    prompts = [document[:PROMPT_TOKENS] for document in documents if len(document) > PROMPT_TOKENS][: arguments.texts]
    texts = [prompt + continue_greedily(target.eval(), prompt, OUTPUT_TOKENS) for prompt in prompts]
    worths = []
    for draft_tokens in arguments.draft_tokens:
        runs = {
            "draft model": [model_proposals(draft.eval(), text, PROMPT_TOKENS, draft_tokens) for text in texts],
            "ngram": [ngram_proposals(text, PROMPT_TOKENS, draft_tokens) for text in texts],
        }
        for drafter, proposals in runs.items():
            played = [play(text, PROMPT_TOKENS, each) for text, each in zip(texts, proposals, strict=True)]
            steps, drafted, accepted = (sum(column) for column in zip(*played, strict=True))
            worths.append(DrafterWorth(drafter, draft_tokens, round(accepted / max(drafted, 1), 3), round(1 + accepted / steps, 2)))
    print(json.dumps({"held_out_loss": losses, "texts": len(texts), "drafters": [asdict(worth) for worth in worths]}, indent=2))


if __name__ == "__main__":
    main()
