"""The verb that says which drafter to use: measured with the models at hand, predicted for loads that need not exist."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from spotserve.cli.plan_inputs import DTYPES
from spotserve.cli.program import app, console
from spotserve.cli.shapes import parse_numbers
from spotserve.config import DEMO_MODEL
from spotserve.demo.corpus import read_pairs, read_texts
from spotserve.speculation.advice import Advice, DraftPrediction, advice_for
from spotserve.speculation.findings import DraftFindings, Findings

MOST_LENGTH = 32
DOUBTFUL = 0.15
"""Mean error of the fitted steps from which predictions are not worth much."""
NUM_PROMPTS = 24
"""Of the default ones; answers to them are some hundred tokens."""
_QUESTIONS_PER_FILE = 4


@app.command()
def advise(
    drafts: Annotated[
        str,
        typer.Option(
            help="Drafters: folders or hub ids of models, ngram, suffix; several with commas between.", show_default=False
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            help="The model that serves: a folder in Hugging Face format, or a hub id.", show_default="the model that ships"
        ),
    ] = str(DEMO_MODEL),
    loads: Annotated[str, typer.Option(help="Clients at once, with commas between.")] = "1,4,16,64",
    lengths: Annotated[str, typer.Option(help="Tokens to draft per step: FIRST..LAST, or with commas between.")] = "0..8",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each client's sequence.", show_default="as in the answers measured")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts like those to be served, one per line.", show_default="questions about Python's library"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=32, max=100_000, help="Tokens of answers to judge drafters by, about.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure drafters for a model on this machine, and say which to use at which load, and how many tokens to draft.

    Speculation changes no answer, only its speed: a drafter guesses tokens, the target checks all of them in one step and keeps
    those that it would have said. What it gains depends on how often the guess is right, on what guessing costs, and on the load:
    the more clients, the less is left for checking. This measures all three and predicts the tokens per second.

    For the model that ships, its small draft model against looking up what was said before:

        spotserve advise --drafts spotserve/demo/models/draft,ngram

    For models and prompts of your own, at the loads that you expect:

        spotserve advise --target llama-8b --drafts llama-1b,ngram --prompts prompts.txt --loads 1,8,32 --context 2000
    """
    clients, wanted = parse_numbers(loads, "--loads", least=1, most=4096), _lengths(lengths)
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype}: expected {', '.join(DTYPES)}", param_hint="--dtype")
    names = list(dict.fromkeys(name.strip() for name in drafts.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("no drafter is named", param_hint="--drafts")
    lines = default_prompts() if prompts is None else _read_prompts(prompts)
    flags = {
        "target": target,
        "drafts": ",".join(names),
        "depth": max(wanted),
        "tokens": tokens,
        "dtype": dtype,
        "threads": threads,
    }
    command = [
        sys.executable,
        "-m",
        "spotserve.bench.advise",
        *(str(part) for name, value in flags.items() for part in (f"--{name}", value)),
    ]
    # A process of its own: the command line does not load torch, and threads are counted when it starts.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    measured = subprocess.run(command, input="\n".join(lines), stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if measured.returncode != 0:
        raise typer.Exit(measured.returncode)
    findings = msgspec.json.decode(measured.stdout, type=Findings)
    advice = advice_for(findings, loads=clients, lengths=wanted, context_tokens=context)
    if as_json:
        console.print_json(msgspec.json.encode(advice).decode())
    else:
        show(advice, console)


def _lengths(text: str) -> tuple[int, ...]:
    first, dots, last = text.partition("..")
    ends = parse_numbers(f"{first},{last}" if dots else text, "--lengths", least=0, most=MOST_LENGTH)
    if max(ends) == 0:
        raise typer.BadParameter(f"{text}: expected one length above 0 at least", param_hint="--lengths")
    return tuple(range(ends[0], ends[-1] + 1)) if dots else ends


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--prompts") from error
    if not lines:
        raise typer.BadParameter(f"{path}: there is no prompt in it", param_hint="--prompts")
    return lines


def default_prompts() -> list[str]:
    """Questions that no model that ships was trained on, a few of each file."""
    return list(islice(_questions(), NUM_PROMPTS))


def _questions() -> Iterator[str]:
    for text in read_texts(held_out=True):
        for pair in islice(read_pairs(text), _QUESTIONS_PER_FILE):
            yield pair.question


def show(advice: Advice, out: Console) -> None:
    """Prints it for people."""
    findings, step = advice.findings, advice.findings.step
    out.print(
        Text.assemble(
            (findings.target, "bold"),
            f", {findings.dtype}, {findings.threads} thread{'' if findings.threads == 1 else 's'}: "
            f"judged by {findings.answer_tokens} tokens of its own answers",
        ),
        soft_wrap=True,
    )
    parts = (
        f"{step.constant_s * 1e3:.2f} ms",
        f"{step.per_sequence_s * 1e6:.0f} us per client",
        f"{step.per_row_s * 1e6:.0f} us per token",
        f"{step.per_kv_token_s * 1e6:.2f} us per token of context",
    )
    out.print(f"  a step takes {' + '.join(parts)}, {findings.step_error:.0%} off on average", highlight=False, soft_wrap=True)
    if findings.step_error > DOUBTFUL:
        out.print("  that is much: was the machine busy? Measure again when it is not", style="yellow", soft_wrap=True)
    told = f"predicted tokens/s by tokens drafted, context {advice.context_tokens:.0f}"
    for measured, predicted in zip(findings.drafts, advice.drafts, strict=True):
        out.print(Text(f"\n{predicted.name}: {told}", style="bold"), soft_wrap=True)
        out.print(_table(predicted, advice), highlight=False)
        out.print(_acceptance(measured), highlight=False, soft_wrap=True)
    out.print()
    for line in advice.loads:
        clients = f"{line.sequences} client{'' if line.sequences == 1 else 's'}"
        said = "off" if line.name is None else f"{line.name} with {line.length}, {line.speedup:.2f} x"
        out.print(Text.assemble(f"at {clients}: ", (said, "bold")), soft_wrap=True)


def _table(predicted: DraftPrediction, advice: Advice) -> Table:
    """Loads by lengths."""
    names = ["clients", *("off" if length == 0 else f"{length} " for length in advice.lengths), "c", "pays from"]
    table = Table(
        *(Column(name, justify="right", overflow="fold") for name in names),
        pad_edge=False,
        padding=(0, 1, 0, 0),
        box=SIMPLE_HEAD,
    )
    for each in predicted.loads:
        best = each.best.length
        rates = [
            Text(f"{rate:,.0f}{'*' if length == best else ' '}", style="bold green" if length == best else "")
            for length, rate in each.tokens_per_s.items()
        ]
        pays = "never" if each.break_even is None else f"{each.break_even:.2f}"
        table.add_row(str(each.sequences), *rates, f"{each.cost_share:.3f}", pays)
    return table


def _acceptance(measured: DraftFindings) -> str:
    profile = measured.profile
    chances = " ".join(f"{chance:.2f}" for chance in profile.acceptance)
    tokens = f"{profile.tokens(profile.longest):.2f} tokens per step with {profile.longest}"
    memory = f"; {measured.weight_bytes / 1e6:,.1f} MB of weights" if measured.is_model else ""
    return f"  accepted by depth {chances}; {tokens}{memory}"
