"""What speculation is worth on this machine: tokens per second over load for each way to draft, beside plain decoding.

    python -m spotserve.bench.speculation --concurrency 1,4,16,64 --out runs/speculation.html

All policies share one model in one process, and every round gives each of them the same prompts, in an order that changes: what
they are compared by is pairs of runs a moment apart. Prompts are never used twice, so that nobody can know answers from before.
Texts come on standard input, as one JSON document {kind: [text, ...]}; each is cut into prompts. `spotserve bench speculation`
sends them.

`oracle` is the bound of what the drafters that need no model could do: of all their guesses at each place the longest right one,
cut where it goes wrong. It is told the answers, and pays for the look-ups of all of them.
"""

import argparse
import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import msgspec
from pydantic import ValidationError

from spotserve.bench.speculation_picture import page
from spotserve.bench.speculation_policies import DEEPEST, ORACLE, PLAIN, deepest, read_policies
from spotserve.bench.speculation_results import Point, Results
from spotserve.config import DEMO_MODEL, EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.bring_up import LoneModel, load_alone, load_draft_model
from spotserve.engine.engine import Engine
from spotserve.engine.speculators import make_speculator
from spotserve.gateway.tokenizer import load_tokenizer
from spotserve.speculation.drafter import EMPTY_DRAFT, Draft, Drafter, DraftTask
from spotserve.speculation.drafters.ngram import NgramDrafter
from spotserve.speculation.drafters.suffix import SuffixDrafter
from spotserve.speculation.fixed import FixedSpeculator

PROMPT_TOKENS = 96
_WARM_UP_ROUNDS = 2
_SHIFT_TOKENS = 7
"""Shares no factor with `PROMPT_TOKENS`, so that pieces begin everywhere before one comes again."""


class PerfectLength:
    """A `Drafter` that knows the answers: of what others guess, the longest part that is right."""

    name = ORACLE

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._drafters = drafters
        self.answers: dict[str, Sequence[int]] = {}
        """By sequence, without its prompt."""

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        """What is right of the best guess."""
        offers = zip(*(drafter.propose(tasks) for drafter in self._drafters), strict=True)
        return [self._best(task, drafts) for task, drafts in zip(tasks, offers, strict=True)]

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """Passed on."""
        for drafter in self._drafters:
            drafter.forget(sequence_id, token_ids)

    def _best(self, task: DraftTask, drafts: Sequence[Draft]) -> Draft:
        ahead = self.answers[task.sequence_id][len(task.token_ids) - task.num_prompt_tokens :]
        best, longest = EMPTY_DRAFT, 0
        for draft in drafts:
            right = 0
            while right < min(draft.tree.trunk, len(ahead)) and draft.tree.token_ids[right] == ahead[right]:
                right += 1
            if right > longest:
                best, longest = Draft(draft.tree.cut(right), draft.confidences[:right]), right
        return best


class Bench:
    """One model, an engine for each policy."""

    def __init__(self, model: LoneModel, policies: Sequence[str], settings: EngineSettings) -> None:
        """Loads the draft model, if any policy needs one.

        Raises:
            ModelError: it cannot be loaded.
        """
        self._oracle = PerfectLength((NgramDrafter(), SuffixDrafter()))
        self._engines: dict[str, Engine] = {}
        own = {
            policy: EngineSettings.model_validate({**settings.model_dump(), "speculation": policy})
            for policy in policies
            if policy != ORACLE
        }
        draft_model = next((loaded for each in own.values() if (loaded := load_draft_model(each, model.spec))), None)
        for policy in policies:
            if policy == ORACLE:
                speculator = FixedSpeculator(self._oracle, max_depth=DEEPEST)
                self._engines[policy] = model.engine(speculator)
            else:
                wanted = draft_model if own[policy].drafts_with_model else None  # shared: one engine at a time has work
                self._engines[policy] = model.engine(make_speculator(own[policy], wanted))
        self._rounds = 0
        self.altered: Counter[str] = Counter()
        """By policy, answers that are not those of plain decoding: near ties of float arithmetic, as far as there are any."""

    def round(self, prompts: Sequence[tuple[int, ...]], *, new_tokens: int, temperature: float) -> dict[str, float]:
        """Seconds that each policy took for the same prompts, all submitted at once; plain decoding comes first, and tells the
        oracle."""
        self._rounds += 1
        names = list(self._engines)
        others = [name for name in names if name != PLAIN]
        random.Random(self._rounds).shuffle(others)
        taken_s: dict[str, float] = {}
        plain: dict[str, list[int]] = {}
        for name in (PLAIN, *others):
            answers, seconds = self._run(self._engines[name], prompts, new_tokens, temperature)
            taken_s[name] = seconds
            if name == PLAIN:
                plain = answers
                self._oracle.answers = dict(answers)
            self.altered[name] += sum(plain[key] != answer for key, answer in answers.items())
        return taken_s

    def _run(
        self, engine: Engine, prompts: Sequence[tuple[int, ...]], new_tokens: int, temperature: float
    ) -> tuple[dict[str, list[int]], float]:
        answers: dict[str, list[int]] = {}
        started_s = perf_counter()
        for index, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=new_tokens, temperature=temperature, seed=index, ignore_eos=True)
            name = f"{self._rounds}-{index}"
            answers[name] = []
            engine.add(Request(request_id=name, prompt_token_ids=prompt, sampling=sampling))
        while engine.has_work:
            for output in engine.step().outputs:
                answers[output.request_id].extend(output.token_ids)
        return answers, perf_counter() - started_s


def measure(
    settings: EngineSettings,
    texts: dict[str, list[str]],
    policies: Sequence[str],
    *,
    concurrency: Sequence[int],
    rounds: int,
    new_tokens: int,
    temperature: float,
) -> Results:
    """All policies at all loads on all kinds of text.

    Raises:
        ModelError: a model cannot be read or computed.
    """
    model = load_alone(settings)
    tokenizer = load_tokenizer(settings.model if settings.tokenizer is None else settings.tokenizer)
    points: list[Point] = []
    altered: Counter[str] = Counter()
    for kind, of_kind in texts.items():
        bench = Bench(model, policies, settings)
        prompts = cut_into_prompts(kind, [tokenizer.encode(text, add_special_tokens=False) for text in of_kind])
        for load in concurrency:
            repeats = rounds if load > 1 else 4 * rounds  # one stream says little about acceptance
            found: dict[str, list[float]] = {policy: [] for policy in policies}
            progress = _Progress(f"{kind}, {load} client{'' if load == 1 else 's'}", _WARM_UP_ROUNDS + repeats)
            for number in range(_WARM_UP_ROUNDS + repeats):
                wave = list(itertools.islice(prompts, load))
                taken_s = bench.round(wave, new_tokens=new_tokens, temperature=temperature)
                if number >= _WARM_UP_ROUNDS:
                    for policy, seconds in taken_s.items():
                        found[policy].append(seconds)
                progress.show(number + 1)
            plain = found[PLAIN]
            points += [
                Point(
                    kind=kind,
                    concurrency=load,
                    policy=policy,
                    output_tokens_per_s=repeats * load * new_tokens / sum(seconds),
                    speedup=sum(plain) / sum(seconds),
                    paired_speedups=tuple(before / after for before, after in zip(plain, seconds, strict=True)),
                )
                for policy, seconds in found.items()
            ]
        altered.update(bench.altered)
    return Results(
        model=settings.model_name,
        draft_model=settings.draft_model,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        temperature=temperature,
        rounds=rounds,
        policies=tuple(policies),
        altered=dict(altered),
        points=tuple(points),
    )


def cut_into_prompts(kind: str, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Pieces of the texts, one of each in turn, none twice; when they run out, the same pieces begin a few tokens later.

    Raises:
        ModelError: the texts have no more.
    """
    longest = max(map(len, texts), default=0)
    if longest < PROMPT_TOKENS:
        raise ModelError(f"{kind}: {longest} tokens are too few, a prompt takes {PROMPT_TOKENS}")
    for shift in range(0, _SHIFT_TOKENS * PROMPT_TOKENS, _SHIFT_TOKENS):
        for start in range(shift, longest - PROMPT_TOKENS + 1, PROMPT_TOKENS):
            for text in texts:
                if start + PROMPT_TOKENS <= len(text):
                    yield tuple(text[start : start + PROMPT_TOKENS])
    raise ModelError(f"{kind}: too little text for so many rounds, as each prompt is to be new")


class _Progress:
    """One line of a terminal that changes; elsewhere one line when all is done."""

    def __init__(self, name: str, rounds: int) -> None:
        self._name = name
        self._rounds = rounds
        self._started_s = perf_counter()

    def show(self, done: int) -> None:
        """So many rounds are over."""
        is_over = done == self._rounds
        line = f"{self._name}: {done} of {self._rounds} rounds, {perf_counter() - self._started_s:.1f} s"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="\n" if is_over else "", file=sys.stderr, flush=True)
        elif is_over:
            print(line, file=sys.stderr, flush=True)


def _counts(text: str) -> tuple[int, ...]:
    counts = sorted({int(count) for count in text.split(",")})
    if counts[0] < 1:
        raise ValueError(text)
    return tuple(counts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--draft-model")
    parser.add_argument("--policies", help="with commas between; off is always among them")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concurrency", type=_counts, default=(1, 4, 16, 64))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a page with pictures here")
    parser.add_argument("--json", action="store_true")
    return parser


def main() -> None:
    """Measures, and prints or draws."""
    parser = _parser()
    arguments = parser.parse_args()
    try:
        policies = read_policies(arguments.policies, draft_model=arguments.draft_model)
    except ValueError as error:
        parser.error(f"--policies: {error}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)  # before anything is measured
    widest, depth = max(arguments.concurrency), deepest(policies)
    try:
        settings = EngineSettings(
            model=arguments.model,
            draft_model=arguments.draft_model,
            dtype=arguments.dtype,
            device=arguments.device,
            threads=arguments.threads,
            max_batch=widest,
            max_step_tokens=max(256, (depth + 1) * widest),
            kv_tokens=max(4096, widest * (PROMPT_TOKENS + arguments.new_tokens + depth + 40)),
            prefix_cache=False,
        )
        texts = msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, list[str]])
        results = measure(
            settings,
            texts,
            policies,
            concurrency=arguments.concurrency,
            rounds=arguments.rounds,
            new_tokens=arguments.new_tokens,
            temperature=arguments.temperature,
        )
    except (ModelError, ValidationError, msgspec.DecodeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(msgspec.json.encode(results).decode() if arguments.json else results.table(), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(page(results), encoding="utf-8")
        print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
