"""Verbs that measure one part on this machine.

Each measures in a process of its own: the command line does not load torch, and threads are counted when a process starts.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from spotserve.bench.speculation_policies import read_policies
from spotserve.cli.plan_inputs import DTYPES
from spotserve.cli.program import app
from spotserve.cli.shapes import parse_numbers
from spotserve.demo.kinds import texts_by_kind

MOST_CLIENTS = 4096
_DEVICES = ("cpu", "cuda")

bench = typer.Typer(no_args_is_help=True, help="Measure one part on this machine.")
app.add_typer(bench, name="bench")


@bench.command("engine")
def bench_engine(
    model: Annotated[
        str | None, typer.Option(help="A folder in Hugging Face format, or a hub id. Default: the model that ships.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (the default), bfloat16, float16 or float64.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    invariant: Annotated[str | None, typer.Option(help="batch (the default) or full: what logits do not depend on.")] = None,
    quantization: Annotated[str | None, typer.Option(help="none (the default) or int8: weights of linear layers.")] = None,
    concurrency: Annotated[str, typer.Option(help="Clients of each closed loop.")] = "1,4,16,64",
    new_tokens: Annotated[int, typer.Option(min=2, help="Output tokens of each request.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of each loop.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Output tokens per second, waits, and the share of the memory's bandwidth of one replica on this machine."""
    given = {
        "model": model,
        "dtype": dtype,
        "threads": threads,
        "invariant": invariant,
        "quantization": quantization,
        "concurrency": concurrency,
        "new-tokens": new_tokens,
        "rounds": rounds,
    }
    _run("spotserve.bench.engine", given, threads=threads, as_json=as_json)


@bench.command("speculation")
def bench_speculation(
    model: Annotated[
        str | None, typer.Option(help="A folder in Hugging Face format, or a hub id.", show_default="the model that ships")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="A small model with the same tokenizer, which drafts: a local folder or a hub id.")
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="off, adaptive, DRAFTER:K, smartspec-2024 and oracle, with commas between; off is always among them.",
            show_default="some of each",
        ),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Clients at once, with commas between.")] = "1,4,16,64",
    new_tokens: Annotated[int, typer.Option(min=2, help="Output tokens of each request.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Of each request.")] = 0.0,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats at each load, four times as many at one client.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A file of text to go on with; may be given several times.", show_default="two kinds of code, and prose"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", dir_okay=False, help="Write a page with a picture for each text.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """What speculation is worth on this machine: speed over plain decoding by load, for each way to draft, on each kind of text.

    Every policy gets the same prompts a moment apart. No answer depends on the policy; how often a guess is right depends on the
    text more than on anything else, so give it yours:

        spotserve bench speculation --text mails.txt --text code.txt --out runs/speculation.html

    With a model of your own and a small one that drafts:

        spotserve bench speculation --model llama-8b --draft-model llama-1b --policies model:2,staged:4,adaptive --concurrency 1,8
    """
    loads = parse_numbers(concurrency, "--concurrency", least=1, most=MOST_CLIENTS)
    try:
        names = read_policies(policies, draft_model=draft_model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--policies") from error
    for value, known, flag in ((dtype, DTYPES, "--dtype"), (device, _DEVICES, "--device")):
        if value not in known:
            raise typer.BadParameter(f"{value}: expected {', '.join(known)}", param_hint=flag)
    texts = {str(path): [_read(path)] for path in text} if text else texts_by_kind()
    given = {
        "model": model,
        "draft-model": draft_model,
        "policies": ",".join(names),
        "concurrency": ",".join(map(str, loads)),
        "new-tokens": new_tokens,
        "temperature": temperature,
        "rounds": rounds,
        "threads": threads,
        "dtype": dtype,
        "device": device,
        "out": out,
    }
    _run("spotserve.bench.speculation", given, threads=threads, as_json=as_json, sent=msgspec.json.encode(texts))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--text") from error


def _run(module: str, given: Mapping[str, object], *, threads: int, as_json: bool, sent: bytes | None = None) -> None:
    """Ends with the exit code of a process that measures, with the flags that are not None."""
    flags = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", module, *flags, *(["--json"] if as_json else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    sys.exit(subprocess.run(command, input=sent, env=environment, check=False).returncode)
