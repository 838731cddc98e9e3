"""The verb that plans without a system: what would run on these machines, and how one would get there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Annotated, Any

import typer

from spotserve.cli.plan_advice import advice, published_min_devices
from spotserve.cli.plan_document import POLICY, PUBLISHED_POLICY, document_of, published_document
from spotserve.cli.plan_inputs import read_draft, read_limits, read_machines, read_model, read_standing
from spotserve.cli.plan_picture import show
from spotserve.cli.program import app, console, errors
from spotserve.config import ControllerSettings
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.rehearsal import Machine, rehearse
from spotserve.core.errors import ConfigError
from spotserve.planner.profiles import read_profile
from spotserve.planner.spotserve_2024 import choose
from spotserve.planner.workload import Lengths, Workload

PATIENCE_S = 2.0
"""A plan that takes longer says so."""

MODEL_HELP = "A name such as llama-3-8b or gpt-20b, a folder in Hugging Face format, or a hub id."
DEVICES_HELP = "Machines, such as g4dn.12xlarge=8 or g5.12xlarge=4@us-east-1a:on-demand,g6.12xlarge=2."
DRAFT_HELP = "Replicas draft: acceptance of a drafted token and its cost as a share of a step, such as 0.7:0.1."
SLO_HELP = "ttft=2,tpot=0.1,e2e=60: seconds at the 99th percentile. Then dollars decide."


@app.command()
def plan(
    model: Annotated[str, typer.Option(help=MODEL_HELP, show_default=False)],
    devices: Annotated[str, typer.Option(metavar="TYPE=COUNT", help=DEVICES_HELP, show_default=False)],
    rate: Annotated[float, typer.Option(min=1e-6, max=1e6, help="Requests per second.")] = 1.0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    gap_cv: Annotated[
        float, typer.Option(min=0, max=100, help="Burstiness: coefficient of variation of the gaps; 1: at random.")
    ] = 1.0,
    slo: Annotated[str | None, typer.Option(metavar="LIMITS", help=SLO_HELP)] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=4096, help="Sequences that a replica runs at once at most.")] = 64,
    draft: Annotated[str | None, typer.Option(metavar="ACCEPTANCE:SHARE", help=DRAFT_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and KV, where the model is a folder or a hub id.")] = "bfloat16",
    start_from: Annotated[
        Path | None, typer.Option("--from", help="What serves already: a document that `spotserve plan --json` printed.")
    ] = None,
    lose: Annotated[
        list[str] | None, typer.Option(help="Machine that is taken then, such as i-3; may be given several times.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0, max=86_400, help="Seconds of notice before that; 0: none.")] = 0.0,
    policy: Annotated[str, typer.Option(help="spotserve, or spotserve-2024: the published rule, which needs --profile.")] = POLICY,
    profile: Annotated[Path | None, typer.Option(help="Measured layer times in the format of SpotServe's artifact.")] = None,
    min_devices: Annotated[
        int | None,
        typer.Option(
            min=1, help="With spotserve-2024: devices of the smallest replica.", show_default="as published, or as memory allows"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Plan for machines that need not exist: the decisions of a running system, without one.

    What runs on eight machines of four T4:

        spotserve plan --model gpt-20b --devices g4dn.12xlarge=8 --rate 0.35

    The least dollars that keep limits, on two kinds of machines:

        spotserve plan --model llama-3-8b --devices g5.xlarge=4,g6.12xlarge=2 --rate 2 --slo ttft=2,tpot=0.1

    What moves when one of them is taken with half a minute of notice:

        spotserve plan --model gpt-20b --devices g4dn.12xlarge=8 --rate 0.35 --json > before.json

        spotserve plan --model gpt-20b --devices g4dn.12xlarge=8 --rate 0.35 --from before.json --lose i-3 --grace 30
    """
    if policy == PUBLISHED_POLICY:
        if slo or start_from or lose or draft:
            raise ConfigError(
                f"--policy {PUBLISHED_POLICY} knows no --slo, --from, --lose or --draft: it chooses from a profile alone"
            )
        document, machines = _published(model, devices, profile, rate=rate, output=output, min_devices=min_devices)
    elif policy == POLICY:
        if profile is not None or min_devices is not None:
            raise ConfigError(f"--profile and --min-devices go with --policy {PUBLISHED_POLICY}")
        workload = Workload(rate_rps=rate, prompt=Lengths.fixed(prompt), output=Lengths.fixed(output), gap_cv=gap_cv)
        with _status("reading the model and planning"):
            document, machines = _planned(
                model,
                devices,
                dtype,
                workload,
                slo,
                EngineTerms(max_batch, draft=read_draft(draft)),
                start_from=start_from,
                lose=lose or [],
                grace_s=grace,
            )
    else:
        raise ConfigError(f"--policy {policy}: expected {POLICY} or {PUBLISHED_POLICY}")
    if as_json:
        console.print_json(data=document)
    else:
        show(document, {each.instance_id: each.hardware.num_devices for each in machines}, console)


@contextmanager
def _status(doing: str) -> Iterator[None]:
    """Says what takes so long once it does; nothing where nobody looks."""
    status = errors.status(f"{doing} ...")
    timer = Timer(PATIENCE_S, status.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()


def _planned(
    model: str,
    devices: str,
    dtype: str,
    workload: Workload,
    slo: str | None,
    engine: EngineTerms,
    *,
    start_from: Path | None,
    lose: list[str],
    grace_s: float,
) -> tuple[dict[str, Any], list[Machine]]:
    """What the production state makes of it."""
    limits = read_limits(slo)
    spec = read_model(model, dtype)
    machines = read_machines(devices, spec.value_bytes)
    known = {each.instance_id for each in machines}
    if strange := [each for each in lose if each not in known]:
        raise ConfigError(f"--lose {strange[0]}: there is no such machine; they are i-1 to i-{len(machines)}")
    longest = workload.prompt.mean + workload.output.mean
    if longest > spec.context_tokens:
        raise ConfigError(f"--prompt and --output: {longest:g} tokens together, {spec.name} takes {spec.context_tokens} at most")
    settings = ControllerSettings.model_validate(
        {
            "planning": "auto",
            "use_idle": not limits,
            **limits,
            "rate_rps": workload.rate_rps,
            "prompt_tokens": round(workload.prompt.mean),
            "output_tokens": round(workload.output.mean),
            "gap_cv": workload.gap_cv,
        }
    )
    standing = read_standing(start_from, machines, spec) if start_from is not None else ()
    rehearsal = rehearse(
        spec, machines, settings, engine=engine, standing=standing, lose=tuple(dict.fromkeys(lose)), grace_s=grace_s
    )
    help_ = "" if rehearsal.state.replicas else advice(spec, machines, workload, engine.max_batch)
    return document_of(rehearsal, spec, rate_rps=workload.rate_rps, lost=list(dict.fromkeys(lose)), advice=help_), machines


def _published(
    model: str, devices: str, profile: Path | None, *, rate: float, output: int, min_devices: int | None
) -> tuple[dict[str, Any], list[Machine]]:
    """What SpotServe's published rule chooses from a profile."""
    if profile is None:
        raise ConfigError(f"--policy {PUBLISHED_POLICY} needs --profile FILE")
    try:
        measured = read_profile(profile.read_bytes(), f"--profile {profile}")
    except (OSError, RecursionError) as error:
        raise ConfigError(f"--profile {profile}: {error}") from error
    machines = read_machines(devices, 4)
    sizes = {each.hardware.num_devices for each in machines}
    if len(sizes) > 1:
        raise ConfigError(f"--policy {PUBLISHED_POLICY}: all machines have as many devices, not {sorted(sizes)}")
    (each,) = sizes
    least = published_min_devices(measured, machines[0].hardware.device) if min_devices is None else min_devices
    choice = choose(
        measured,
        num_instances=len(machines),
        devices_per_instance=each,
        required_rps=rate,
        min_devices=least,
        output_tokens=output,
    )
    names = [f"{machine.instance_id}/{index}" for machine in machines for index in range(each)]
    usd_per_hour = sum(machine.usd_per_hour for machine in machines)
    document = published_document(choice, model=model, devices=names, usd_per_hour=usd_per_hour, rate_rps=rate, min_devices=least)
    return document, machines
