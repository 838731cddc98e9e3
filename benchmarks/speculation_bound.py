"""How near speculation comes to its bound where a step of the target dwarfs everything else, and what each rule makes of it.

    python benchmarks/speculation_bound.py --target 300M --threads 2
    python benchmarks/speculation_bound.py --target 7B --draft 100M --dtype bfloat16 --device cuda --json

The target is the model that ships, enlarged: its own text at the cost of a large model (`spotserve.bench.enlarged`). Three parts:

bound    A drafter that proposes the target's own next token with probability a, independently, and costs next to nothing. Speedup
         over plain decoding of fixed depths k, beside E(a, k) T(B) / T(B, k): E = (1 - a^(k+1)) / (1 - a) expected tokens, T the
         median times of plain steps and of steps that verify k wrong tokens for each of B sequences. Then the adaptive rule, and
         SmartSpec as it was released.
change   The same drafter, with a = 0.9, then 0.05 (a hard passage), then 0.9 again, one client: who comes back?
staged   Real drafts of the small model that ships, enlarged to a draft's cost (--draft), alone and with prompt lookup as its own
         first stage, one client.

Speeds count steps in which all sequences decode. All rules take turns on one loaded model.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spotserve.bench.enlarged import enlarge_to
from spotserve.config import DEMO_MODEL, EngineSettings
from spotserve.core.request import Request, SamplingParams
from spotserve.demo.corpus import read_texts
from spotserve.engine.bring_up import LoneModel, load_alone, load_draft_model
from spotserve.engine.engine import Engine
from spotserve.engine.speculators import make_speculator, step_law
from spotserve.gateway.tokenizer import load_tokenizer
from spotserve.speculation.adaptive import AdaptiveSpeculator
from spotserve.speculation.drafter import Draft, DraftTask
from spotserve.speculation.fixed import FixedSpeculator
from spotserve.speculation.smartspec_2024 import SmartSpec2024
from spotserve.speculation.speculator import Speculator
from spotserve.speculation.tree import DraftTree

DEEPEST = 8
PROMPT_TOKENS = 48
DRAFT_MODEL = DEMO_MODEL.parent / "draft"
Prompts = Sequence[tuple[int, ...]]


@dataclass
class Controlled:
    """Knows the answers, and says the right token with a probability that may depend on the position in the answer."""

    acceptance: Callable[[int], float]
    name: str = "controlled"
    answers: dict[str, Sequence[int]] = field(default_factory=dict)
    drafts: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    """By sequence what it says at each position, and how sure it is: made once, so that drafting costs next to nothing."""

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        return [self._draft(task) for task in tasks]

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        del token_ids
        self.drafts.pop(sequence_id, None)

    def _draft(self, task: DraftTask) -> Draft:
        if task.sequence_id not in self.drafts:
            answer, chance = self.answers[task.sequence_id], random.Random(task.sequence_id)
            sure = [self.acceptance(place) for place in range(len(answer))]
            said = [right if chance.random() < sure[at] else (right + 1) % 1000 for at, right in enumerate(answer)]
            self.drafts[task.sequence_id] = (said, sure)
        said, sure = self.drafts[task.sequence_id]
        start = len(task.token_ids) - task.num_prompt_tokens
        end = start + task.max_depth
        return Draft(DraftTree.chain(said[start:end]), tuple(sure[start:end]))


class Wrong:
    """Proposes what nobody says."""

    name = "wrong"

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        return [Draft(DraftTree.chain([5] * task.max_depth), (0.5,) * task.max_depth) for task in tasks]

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        pass


@dataclass
class Run:
    """What an engine did with some prompts."""

    answers: dict[str, list[int]]
    tokens: int
    seconds: float
    step_s: float
    """Median of a step."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(engine: Engine, prompts: Prompts, new_tokens: int, label: str) -> Run:
    """All prompts at once; what is counted are steps in which all of them decode."""
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        answers[f"{label}{index}"] = []
        engine.add(Request(request_id=f"{label}{index}", prompt_token_ids=prompt, sampling=sampling))
    tokens, steps = 0, []
    while engine.has_work:
        result = engine.step()
        for output in result.outputs:
            answers[output.request_id].extend(output.token_ids)
        if result.num_prefill_tokens == 0 and len(result.outputs) == len(prompts):
            tokens += sum(len(output.token_ids) for output in result.outputs)
            steps.append(result.step_s)
    return Run(answers, tokens, sum(steps), statistics.median(steps))


def total_rate(engine: Engine, rounds: Sequence[Prompts], new_tokens: int, told: Controlled | None, known: Sequence[Run]) -> float:
    """Tokens per second over several rounds; a drafter that knows answers is told those of each round first. The first round warms
    up."""
    tokens, seconds = 0, 0.0
    for number, prompts in enumerate(rounds):
        if told is not None:
            told.answers = dict(known[number].answers)
        done = run(engine, prompts, new_tokens, f"{number}-")
        if number or len(rounds) == 1:
            tokens, seconds = tokens + done.tokens, seconds + done.seconds
    return tokens / seconds


def rules(drafter: Controlled, depths: Sequence[int], device: str) -> dict[str, Speculator]:
    """By name."""
    law = step_law(device)
    return {
        **{f"k={depth}": FixedSpeculator(drafter, max_depth=depth) for depth in depths},
        "adaptive": AdaptiveSpeculator((drafter,), max_depth=DEEPEST, law=law),
        "smartspec-2024": SmartSpec2024(drafter, max_depth=DEEPEST, law=law),
    }


def expected_tokens(acceptance: float, depth: int) -> float:
    """Of a step."""
    return sum(acceptance**place for place in range(depth + 1))


def bound(model: LoneModel, waves: "Waves", arguments: argparse.Namespace) -> list[dict[str, object]]:
    """See the module."""
    rows: list[dict[str, object]] = []
    for load in arguments.concurrency:
        num_rounds = 1 + max(1, arguments.streams // load)
        rounds = [waves.take(load) for _ in range(num_rounds)]
        plain = [run(model.engine(None), prompts, arguments.new_tokens, f"{number}-") for number, prompts in enumerate(rounds)]
        plain_rate = sum(done.tokens for done in plain[1:]) / sum(done.seconds for done in plain[1:])
        plain_s = statistics.median(done.step_s for done in plain[1:])
        verify_s = {}
        for depth in arguments.depths:
            wrong = model.engine(FixedSpeculator(Wrong(), max_depth=depth))
            verify_s[depth] = [run(wrong, prompts, min(24, arguments.new_tokens), "w").step_s for prompts in rounds[:2]][-1]
        for acceptance in arguments.acceptance:
            drafter = Controlled(lambda _, acceptance=acceptance: acceptance)
            row: dict[str, object] = {"load": load, "acceptance": acceptance, "plain_tokens_per_s": plain_rate}
            limits = {depth: expected_tokens(acceptance, depth) * plain_s / verify_s[depth] for depth in arguments.depths}
            for name, speculator in rules(drafter, arguments.depths, arguments.device).items():
                row[name] = total_rate(model.engine(speculator), rounds, arguments.new_tokens, drafter, plain) / plain_rate
            row["bound"] = {f"k={depth}": limit for depth, limit in limits.items()}
            rows.append(row)
            tell(describe(row))
    return rows


def describe(row: dict[str, object]) -> str:
    """One line."""
    limits = row["bound"]
    assert isinstance(limits, dict)
    cells = [f"{name} {row[name]:.2f} ({limits[name]:.2f})" for name in limits]
    return (
        f"{row['load']:>3} clients, a = {row['acceptance']}: "
        + ", ".join(cells)
        + f"; adaptive {row['adaptive']:.2f}, smartspec-2024 {row['smartspec-2024']:.2f}"
    )


def change(model: LoneModel, waves: "Waves", arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Speedup over plain decoding in each third of an answer whose middle is hard to guess."""
    third = arguments.change_tokens // 3
    found: dict[str, list[float]] = {}
    prompts = waves.take(1)
    plain = run(model.engine(None), prompts, 3 * third, "c")
    drafter = Controlled(lambda place: 0.05 if third <= place < 2 * third else 0.9)
    for name, speculator in rules(drafter, (3,), arguments.device).items():
        drafter.answers = dict(plain.answers)
        engine = model.engine(speculator)
        sampling = SamplingParams(max_tokens=3 * third, temperature=0.0, ignore_eos=True)
        engine.add(Request(request_id="c0", prompt_token_ids=prompts[0], sampling=sampling))
        tokens, seconds, position = [0, 0, 0], [0.0, 0.0, 0.0], 0
        while engine.has_work:
            result = engine.step()
            for output in result.outputs:
                part = min(2, position // third)
                if not result.num_prefill_tokens:
                    tokens[part] += len(output.token_ids)
                    seconds[part] += result.step_s
                position += len(output.token_ids)
        found[name] = [count / spent / plain.rate for count, spent in zip(tokens, seconds, strict=True)]
        tell(f"change, {name}: " + " / ".join(f"{speedup:.2f}" for speedup in found[name]))
    return found


def staged(model: LoneModel, waves: "Waves", settings: EngineSettings, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one client by rule."""
    found: dict[str, float] = {}
    rounds = [waves.take(1) for _ in range(1 + arguments.streams)]
    draft_model = load_draft_model(settings.model_copy(update={"speculation": "adaptive"}), model.spec)
    names = ["off", "ngram:4", *(f"{stage}:{depth}" for depth in (2, 4, 8) for stage in ("model", "staged")), "adaptive"]
    for name in names:
        own = EngineSettings.model_validate({**settings.model_dump(), "speculation": name})
        engine = model.engine(make_speculator(own, draft_model))
        found[name] = total_rate(engine, rounds, arguments.new_tokens, None, ())
        tell(f"staged, {name}: {found[name]:.1f} tokens/s, {found[name] / found['off']:.2f} x")
    return found


class Waves:
    """Prompts, none twice."""

    def __init__(self) -> None:
        tokenizer = load_tokenizer(str(DEMO_MODEL))
        texts = [tokenizer.encode(text, add_special_tokens=False) for text in read_texts(held_out=True)]
        self._prompts = [
            tuple(text[start : start + PROMPT_TOKENS])
            for start in range(0, 4000, PROMPT_TOKENS)
            for text in texts
            if start + PROMPT_TOKENS <= len(text)
        ]

    def take(self, count: int) -> Prompts:
        """The next ones."""
        taken, self._prompts = self._prompts[:count], self._prompts[count:]
        assert len(taken) == count, "the held-out files have no more"
        return taken


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def numbers(kind: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="300M", help="size of the target, a name of spotserve.bench.enlarged.SHAPES")
    parser.add_argument("--draft", help="size of the draft model; none: no part `staged`")
    parser.add_argument("--folder", type=Path, help="where enlarged models are kept (default: a temporary folder)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--concurrency", type=numbers(int), default=(1, 8, 32, 64))
    parser.add_argument("--acceptance", type=numbers(float), default=(0.5, 0.8, 0.95))
    parser.add_argument("--depths", type=numbers(int), default=(1, 3, 5, 8))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, default=6, help="answers per figure at one client; rounds at more")
    parser.add_argument("--change-tokens", type=int, default=600)
    parser.add_argument("--parts", default="bound,change,staged")
    parser.add_argument("--json", action="store_true")
    return parser


def main() -> None:
    """Measures and prints."""
    arguments = parser().parse_args()
    parts = arguments.parts.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        target, draft = folder / f"target-{arguments.target}", folder / f"draft-{arguments.draft}"
        if not target.exists():
            enlarge_to(arguments.target, DEMO_MODEL, target, dtype=arguments.dtype)
        if arguments.draft and not draft.exists():
            enlarge_to(arguments.draft, DRAFT_MODEL, draft, dtype=arguments.dtype)
        widest = max(arguments.concurrency)
        longest = max(arguments.new_tokens, arguments.change_tokens)
        settings = EngineSettings(
            model=str(target),
            draft_model=str(draft) if arguments.draft else None,
            dtype=arguments.dtype,
            device=arguments.device,
            threads=arguments.threads,
            max_batch=widest,
            max_step_tokens=max(256, widest * (DEEPEST + 1)),
            kv_tokens=max(longest + PROMPT_TOKENS + 64, widest * (PROMPT_TOKENS + arguments.new_tokens + 32)),
            prefix_cache=False,
        )
        model, waves = load_alone(settings), Waves()
        tell(f"{arguments.target} on {arguments.device} is loaded")
        results: dict[str, object] = {"target": arguments.target, "draft": arguments.draft, "device": arguments.device}
        if "staged" in parts and arguments.draft:
            results["staged"] = staged(model, waves, settings, arguments)
        if "change" in parts:
            results["change"] = change(model, waves, arguments)
        if "bound" in parts:
            results["bound"] = bound(model, waves, arguments)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
