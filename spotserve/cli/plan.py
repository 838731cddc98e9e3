"""The verb that plans without a system: what would run on these machines, and how one would get there."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spotserve.cli.plan_document import POLICY, PUBLISHED_POLICY, document_of, published_document
from spotserve.cli.plan_inputs import read_limits, read_machines, read_model, read_standing
from spotserve.cli.plan_picture import show
from spotserve.cli.program import app, console
from spotserve.config import ControllerSettings
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.rehearsal import Machine, rehearse
from spotserve.core.errors import ConfigError
from spotserve.planner.profiles import read_profile
from spotserve.planner.spotserve_2024 import choose


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option(
            help="A name such as llama-3-8b or gpt-20b, a folder in Hugging Face format, or a hub id.", show_default=False
        ),
    ],
    devices: Annotated[
        str,
        typer.Option(
            metavar="TYPE=COUNT", help="Machines, such as g4dn.12xlarge=8 or g5.12xlarge=4@us-east-1a:on-demand,g6.12xlarge=2."
        ),
    ],
    rate: Annotated[float, typer.Option(min=1e-6, help="Requests per second.")] = 1.0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    gap_cv: Annotated[float, typer.Option(min=0, help="Burstiness: coefficient of variation of the gaps; 1: at random.")] = 1.0,
    slo: Annotated[
        str | None,
        typer.Option(metavar="LIMITS", help="ttft=2,tpot=0.1,e2e=60: seconds at the 99th percentile. Then dollars decide."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences that a replica runs at once at most.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of weights and KV, where the model is a folder or a hub id.")] = "bfloat16",
    start_from: Annotated[
        Path | None, typer.Option("--from", help="What serves already: a document that `spotserve plan --json` printed.")
    ] = None,
    lose: Annotated[
        list[str] | None, typer.Option(help="Machine that is taken then, such as i-3; may be given several times.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds of notice before that; 0: none.")] = 0.0,
    policy: Annotated[str, typer.Option(help="spotserve, or spotserve-2024: the published rule, which needs --profile.")] = POLICY,
    profile: Annotated[Path | None, typer.Option(help="Measured layer times in the format of SpotServe's artifact.")] = None,
    min_devices: Annotated[int, typer.Option(min=1, help="With spotserve-2024: devices that the model takes at least.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Plan for machines that need not exist: the decisions of a running system, without one.

    Example: what runs on eight machines, and what moves when one of them goes:

        spotserve plan --model gpt-20b --devices g4dn.12xlarge=8 --rate 0.35 --json > before.json

        spotserve plan --model gpt-20b --devices g4dn.12xlarge=8 --rate 0.35 --from before.json --lose i-3 --grace 30
    """
    if policy == PUBLISHED_POLICY:
        document, machines = _published(model, devices, profile, rate=rate, min_devices=min_devices)
    elif policy == POLICY:
        spec = read_model(model, dtype)
        machines = read_machines(devices, spec.value_bytes)
        known = {each.instance_id for each in machines}
        if strange := [each for each in lose or () if each not in known]:
            raise ConfigError(f"--lose {strange[0]}: there is no such machine; they are i-1 to i-{len(machines)}")
        limits = read_limits(slo)
        load = {"rate_rps": rate, "prompt_tokens": prompt, "output_tokens": output, "gap_cv": gap_cv}
        settings = ControllerSettings.model_validate({"planning": "auto", "use_idle": not limits, **limits, **load})
        standing = read_standing(start_from, machines, spec) if start_from is not None else ()
        rehearsal = rehearse(
            spec, machines, settings, engine=EngineTerms(max_batch), standing=standing, lose=lose or (), grace_s=grace
        )
        document = document_of(rehearsal, spec)
    else:
        raise ConfigError(f"--policy {policy}: expected {POLICY} or {PUBLISHED_POLICY}")
    if as_json:
        console.print_json(data=document)
    else:
        show(document, {each.instance_id: each.hardware.num_devices for each in machines}, console)


def _published(
    model: str, devices: str, profile: Path | None, *, rate: float, min_devices: int
) -> tuple[dict[str, Any], list[Machine]]:
    """What SpotServe's published rule chooses from a profile."""
    if profile is None:
        raise ConfigError(f"--policy {PUBLISHED_POLICY} needs --profile FILE")
    try:
        measured = read_profile(profile.read_bytes(), str(profile))
    except OSError as error:
        raise ConfigError(f"--profile {profile}: {error}") from error
    machines = read_machines(devices, 4)
    sizes = {each.hardware.num_devices for each in machines}
    if len(sizes) > 1:
        raise ConfigError(f"--policy {PUBLISHED_POLICY}: all machines have as many devices, not {sorted(sizes)}")
    (each,) = sizes
    choice = choose(measured, num_instances=len(machines), devices_per_instance=each, required_rps=rate, min_devices=min_devices)
    names = [f"{machine.instance_id}/{index}" for machine in machines for index in range(each)]
    usd_per_hour = sum(machine.usd_per_hour for machine in machines)
    return published_document(choice, model=model, devices=names, usd_per_hour=usd_per_hour), machines
