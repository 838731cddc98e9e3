"""What `spotserve replay` does once its flags are read: simulates a study, or drives a running system."""

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from spotserve.cli.local import own_cluster
from spotserve.cli.program import console, errors
from spotserve.cli.reach import secret_of
from spotserve.core.errors import ConfigError
from spotserve.replay.case import case_name
from spotserve.replay.measures import metric_names
from spotserve.replay.page import Facts, page
from spotserve.replay.report import describe, report_table_text
from spotserve.replay.run import ReplayOptions, run_replay
from spotserve.replay.scenario import Show
from spotserve.replay.study import Result, StudyOptions, cases_of, num_clamped, parts_of, play_all, policies_told, read_traces
from spotserve.replay.study_folder import config_of, summary_of, write_study
from spotserve.replay.study_report import study_tables
from spotserve.replay.summary import Summary
from spotserve.replay.timeline import Timeline, merge
from spotserve.replay.verdicts import Claim, check_claims, failures

PATIENCE_S = 2.0
"""What takes longer is shown to go on."""
_LIVE_METRICS = (
    "tokens_altered",
    "tokens_contradicted",
    "tokens_duplicate",
    "tie_flips",
    "requests_altered",
    "requests_equal",
    "requests_without_reference",
    "requests_in_flight_at_losses",
    "requests_reattached",
    "capacity_actions_failed",
    "schedule_delay_p99_s",
    "gap_steady_p99_s",
    "gap_with_notice_p99_s",
    "gap_without_notice_p99_s",
)
"""What only a live run has and somebody may want to assert."""
_NOT_REPEATED = ("out", "jobs", "as_json", "api_key")
"""Flags that change nothing of what is played."""


def simulate(options: StudyOptions, out: Path, claims: Sequence[Claim], *, command: str, as_json: bool) -> int:
    """Plays a study, writes its folder, prints its table; 1 where something that was asserted does not hold.

    Raises:
        TraceError, ConfigError: before anything is played.
    """
    names = [case_name(policy, rate, is_swept=len(options.rate_scales) > 1) for policy, rate, _ in _parts(options)]
    check_claims(claims, metric_names(), [*names, *options.policies])
    fleet, load = read_traces(options)
    timeline = merge(fleet, load, replace(options.scaling, rate_scale=options.rate_scales[0]))
    described = describe(timeline)
    notes = [*fleet.assumed, *load.assumed, *_cut(timeline, options)]
    if not as_json:
        console.print(described, highlight=False, soft_wrap=True)
        for note in notes:
            console.print(Text(note, style="dim"), soft_wrap=True)
    with _bar(options, timeline.duration_s) as (show, on_result):
        cases = cases_of(options, play_all(options, folder=out, on_result=on_result, show=show))
    config = config_of(options, command)
    facts = Facts(
        title=f"{options.model.name} on {options.machine.name}",
        described=f"Simulated. {described}. Machines of {', '.join(config['options']['capacity'])}, requests of "
        f"{config['options']['requests']}.",
        command=command,
        config={**config["options"], **{f"sha256 of {name}": checksum for name, checksum in config["traces"].items()}},
        policies=policies_told(options),
    )
    tables = [f"{title}\n{report_table_text(table)}" for title, table in study_tables(cases, is_whole=True)]
    text = "\n".join([described, *notes, "", *tables])
    write_study(out, cases, config=config, text=text, page=page(cases, facts))
    if as_json:
        print(json.dumps(summary_of(cases)))
    else:
        for title, table in study_tables(cases):
            console.print(*[title] * bool(title), table, sep="\n")
        console.print(f"written to {out}: report.html has the pictures, summary.json every number", highlight=False)
    return _verdict(claims, {case.name: case.summary for case in cases}, {case.name: case.policy for case in cases})


def drive(
    options: Callable[[str, str], ReplayOptions],
    claims: Sequence[Claim],
    *,
    url: str | None,
    instances: int,
    as_json: bool,
) -> int:
    """Replays against a running system, or one of its own; `options`: by its URL and secret.

    Raises:
        TraceError, ConfigError, CloudError: before the replay began.
    """
    check_claims(claims, [*metric_names(), *_LIVE_METRICS], ["spotserve"])
    with contextlib.ExitStack() as at_end:
        if url is None:
            url, secret = at_end.enter_context(own_cluster(0, instances))
        else:
            secret = secret_of(url)
        chosen = options(url, secret)
        exit_code = run_replay(chosen, errors if as_json else console)
    summary: Summary = json.loads((chosen.out / "summary.json").read_bytes())
    if as_json:
        print(json.dumps(summary))
    return _verdict(claims, {"spotserve": summary}, {"spotserve": "spotserve"}) or exit_code


def _verdict(claims: Sequence[Claim], summaries: dict[str, Summary], policy_of: dict[str, str]) -> int:
    lines = failures(claims, summaries, policy_of)
    for line in lines:
        errors.print(Text.assemble(("does not hold: ", "bold red"), line), soft_wrap=True)
    return 1 if lines else 0


def _parts(options: StudyOptions) -> list[tuple[str, float, int]]:
    return [(part.policy, part.rate_scale, part.repeat) for part in parts_of(options)]


def _cut(timeline: Timeline, options: StudyOptions) -> list[str]:
    """What is not played as the trace has it."""
    cut, most = num_clamped(timeline, options.model.context_tokens), options.model.context_tokens
    return [f"{cut} requests are cut to the {most} tokens that {options.model.name} takes"] if cut else []


@contextlib.contextmanager
def _bar(options: StudyOptions, duration_s: float) -> Iterator[tuple[Show, Callable[[Result], None]]]:
    """A bar for all runs and one for that under way, once they take longer than one likes to wait; nothing where nobody looks."""
    num_parts, began_s = len(parts_of(options)), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    bar = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
    whole = bar.add_task("runs", total=num_parts, told=f"0 of {num_parts}")
    one = bar.add_task("this one", total=duration_s, told="", visible=options.jobs == 1)

    def wake() -> None:
        if not bar.live.is_started and time.monotonic() - began_s > PATIENCE_S:
            bar.start()

    def show(now_s: float, ended: int, machines: int) -> None:
        wake()
        bar.update(one, completed=now_s, told=f"{now_s / 3600:.1f} h, {ended:,} answered, {machines} machines")

    def on_result(result: Result) -> None:
        wake()
        bar.advance(whole)
        bar.update(whole, told=f"{int(bar.tasks[0].completed)} of {num_parts}, last {result.part.policy}")

    if options.jobs > 1:  # nobody says how far they are until the first one has ended
        bar.start()
    try:
        yield show, on_result
    finally:
        bar.stop()


def command_of(context: typer.Context) -> str:
    """The command that plays the same again: flags that were given, without those that change nothing, and without folders that
    another machine does not have."""
    words = ["spotserve", "replay"]
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in _NOT_REPEATED or not _is_given(context, name):
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            words += [parameter.opts[0], _portable(str(each))]
    return shlex.join(words)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether a flag stands in the command; the environment does not count."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _portable(text: str) -> str:
    return Path(text).name if Path(text).is_absolute() else text


def refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Flags that were given and do not apply.

    Raises:
        ConfigError: there is one; the message names it.
    """
    for parameter in context.command.params:
        if parameter.name in names and _is_given(context, parameter.name):
            raise ConfigError(f"{parameter.opts[0]} {why}")
