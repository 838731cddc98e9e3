"""Policies side by side on the same traces, simulated: from trace files to one result for each policy, rate and repeat.

Repeat 0 plays the traces as they are. Repeat k turns the requests round against the fleet's history, by an offset that is drawn
from the seed, and draws anew which losses come with a notice: losses meet other requests each time. All policies play the same
repeats.
Runs are independent, so they can go side by side in processes; results are the same, to the last byte, however many there are.
A process writes the rows of its run itself and hands back what the report needs, whose size does not depend on the requests.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from spotserve.core.errors import ConfigError
from spotserve.core.hardware import InstanceType
from spotserve.core.model import ModelSpec
from spotserve.planner.drafting import Draft
from spotserve.planner.memory import STEP_TOKENS
from spotserve.planner.workload import Objective
from spotserve.replay.case import Case, case_name
from spotserve.replay.draws import share_drawn
from spotserve.replay.formats import parse_capacity, parse_requests, read_trace_text
from spotserve.replay.intervals import means, over_repeats
from spotserve.replay.measures import AFTER_LOSS_S, measure
from spotserve.replay.policies import Policy, policy_named
from spotserve.replay.rows import Options
from spotserve.replay.run_files import write_run
from spotserve.replay.scenario import Delays, Prices, Scenario, Show, show_nothing
from spotserve.replay.sketch import NUM_BINS, Sketch, sketch
from spotserve.replay.summary import Objectives, Summary
from spotserve.replay.timeline import Action, Arrive, Scaling, Timeline, merge
from spotserve.replay.trace import CapacityTrace, RequestTrace, merge_capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """What is played, by whom, and how often."""

    capacity: tuple[Path, ...]
    """One file, or one for each zone or kind."""
    requests: Path
    model: ModelSpec
    machine: InstanceType
    prices: Prices
    policies: tuple[str, ...] = ("spotserve",)
    scaling: Scaling = field(default_factory=Scaling)
    rate_scales: tuple[float, ...] = (1.0,)
    reading: Options = field(default_factory=Options)
    delays: Delays = field(default_factory=Delays)
    objectives: Objectives = field(default_factory=Objectives)
    limits: Objective = field(default_factory=Objective)
    max_batch: int = 256
    step_tokens: int = STEP_TOKENS
    draft: Draft | None = None
    rents: bool = False
    falls_back: bool = True
    after_loss_s: float = AFTER_LOSS_S
    repeats: int = 1
    jobs: int = 1

    def __post_init__(self) -> None:
        if not self.capacity or not self.policies or not self.rate_scales:
            raise ConfigError("a study needs a capacity trace, a policy and a rate")
        if self.repeats < 1 or min(self.jobs, self.max_batch, self.step_tokens) < 1:
            raise ConfigError(
                f"repeat={self.repeats}, jobs={self.jobs}, max_batch={self.max_batch}, step_tokens={self.step_tokens}: "
                "expected whole numbers from 1 on"
            )
        for name in self.policies:
            policy_named(name)


_BINS_OF_ALL = 4_000
"""Of all pictures over time of a page."""


@dataclass(frozen=True, slots=True)
class Part:
    """One run of a study."""

    policy: str
    rate_scale: float
    repeat: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it."""

    part: Part
    summary: Summary
    sketch: Sketch


def read_traces(options: StudyOptions) -> tuple[CapacityTrace, RequestTrace]:
    """The traces of a study.

    Raises:
        TraceError: a file cannot be read, or does not hold what its format promises.
        ConfigError: two capacity files have one name.
    """
    names = [path.stem for path in options.capacity]
    if len(set(names)) < len(names):
        raise ConfigError(f"--capacity: files of one name, {', '.join(names)}: their zones are called as they are")
    return _read(options.capacity, options.requests, options.reading)


@lru_cache(maxsize=1)
def _read(capacity: tuple[Path, ...], requests: Path, reading: Options) -> tuple[CapacityTrace, RequestTrace]:
    """Once for all runs of a process."""
    fleets = {path.stem: parse_capacity(read_trace_text(path), str(path), reading) for path in capacity}
    return merge_capacity(fleets), parse_requests(read_trace_text(requests), str(requests), reading)


def scenario_of(options: StudyOptions, fleet: CapacityTrace, load: RequestTrace, *, rate_scale: float, repeat: int) -> Scenario:
    """What is played in one repeat.

    Raises:
        ConfigError: no request lies in the part that is to be played.
    """
    scaling = replace(options.scaling, rate_scale=rate_scale, seed=options.scaling.seed + repeat)
    timeline = merge(fleet, load, scaling)
    if not timeline.arrivals:
        raise ConfigError(f"start_s={scaling.start_s:g}, duration_s={scaling.duration_s}: no request of {options.requests} in it")
    if repeat:
        timeline = turned(timeline, share_drawn(options.scaling.seed, "turn", repeat))
    return Scenario(
        timeline=clamped(timeline, options.model.context_tokens),
        model=options.model,
        machine=options.machine,
        prices=options.prices,
        delays=options.delays,
        objectives=options.objectives,
        limits=options.limits,
        max_batch=options.max_batch,
        step_tokens=options.step_tokens,
        draft=options.draft,
        grace_s=scaling.grace_s,
        rents=options.rents,
        falls_back=options.falls_back,
        seed=scaling.seed,
    )


def turned(timeline: Timeline, share: float) -> Timeline:
    """Its requests later by a share of its length, the last ones first."""
    duration_s = timeline.duration_s
    later = ((arrive.at_s + share * duration_s) % duration_s for arrive in timeline.arrivals)
    arrivals = sorted(zip(later, timeline.arrivals, strict=True), key=lambda pair: (pair[0], pair[1].index))
    moved = [replace(arrive, at_s=at_s, index=index) for index, (at_s, arrive) in enumerate(arrivals)]
    fleet = [action for action in timeline.actions if not isinstance(action, Arrive)]
    actions: list[Action] = sorted([*fleet, *moved], key=lambda action: action.at_s)
    return replace(timeline, actions=tuple(actions))


def clamped(timeline: Timeline, context_tokens: int) -> Timeline:
    """Prompts cut so that prompt and answer fit the model, as a client of a running system has to; and answers, where that is not
    enough."""

    def fitted(action: Action) -> Action:
        if not isinstance(action, Arrive) or action.prompt_tokens + action.output_tokens <= context_tokens:
            return action
        output = min(action.output_tokens, context_tokens - 1)
        return replace(action, prompt_tokens=min(action.prompt_tokens, context_tokens - output), output_tokens=output)

    return replace(timeline, actions=tuple(fitted(action) for action in timeline.actions))


def num_clamped(timeline: Timeline, context_tokens: int) -> int:
    """Requests that `clamped` would change."""
    return sum(arrive.prompt_tokens + arrive.output_tokens > context_tokens for arrive in timeline.arrivals)


def parts_of(options: StudyOptions) -> list[Part]:
    """All runs, policies of one rate and repeat side by side."""
    return [
        Part(policy, rate_scale, repeat)
        for rate_scale in options.rate_scales
        for repeat in range(options.repeats)
        for policy in options.policies
    ]


def run_name(options: StudyOptions, part: Part) -> str:
    """Folder of one run, in that of the study."""
    name = case_name(part.policy, part.rate_scale, is_swept=len(options.rate_scales) > 1)
    return f"{name}-{part.repeat}" if options.repeats > 1 else name


def play(options: StudyOptions, part: Part, policy: Policy, folder: Path | None = None, show: Show = show_nothing) -> Result:
    """One run; its rows go into its folder in that of the study, if there is one."""
    fleet, load = read_traces(options)
    scenario = scenario_of(options, fleet, load, rate_scale=part.rate_scale, repeat=part.repeat)
    replayed = policy.play(scenario, show)
    if folder is not None:
        write_run(folder / run_name(options, part), replayed)
    num_bins = max(120, min(NUM_BINS, _BINS_OF_ALL // (len(options.policies) * len(options.rate_scales))))
    summary = measure(replayed, options.objectives, after_loss_s=options.after_loss_s)
    return Result(part, summary, sketch(replayed, num_bins))


def play_all(
    options: StudyOptions, *, folder: Path | None, on_result: Callable[[Result], None], show: Show = show_nothing
) -> list[Result]:
    """Every run, in order; `on_result` is told as they end, `show` of the one under way where they go one by one."""
    parts = parts_of(options)
    policies = {name: policy_named(name) for name in options.policies}
    if options.jobs == 1 or len(parts) == 1:
        return [_told(play(options, part, policies[part.policy], folder, show), on_result) for part in parts]
    with ProcessPoolExecutor(max_workers=min(options.jobs, len(parts)), mp_context=get_context("spawn")) as pool:
        under_way = [pool.submit(play, options, part, policies[part.policy], folder) for part in parts]
        return [_told(each.result(), on_result) for each in under_way]


def _told(result: Result, on_result: Callable[[Result], None]) -> Result:
    on_result(result)
    return result


def cases_of(options: StudyOptions, results: Sequence[Result]) -> list[Case]:
    """Results as a report shows them: policies side by side, one rate after the other."""
    groups: dict[tuple[float, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.part.rate_scale, result.part.policy), []).append(result)
    return [_case(options, rate_scale, policy, found) for (rate_scale, policy), found in groups.items()]


def _case(options: StudyOptions, rate_scale: float, policy: str, results: Sequence[Result]) -> Case:
    summaries = tuple(result.summary for result in sorted(results, key=lambda result: result.part.repeat))
    return Case(
        name=case_name(policy, rate_scale, is_swept=len(options.rate_scales) > 1),
        policy=policy,
        rate_scale=rate_scale,
        summaries=summaries,
        summary=means(summaries),
        intervals=over_repeats(summaries) if len(summaries) > 1 else {},
        sketch=min(results, key=lambda result: result.part.repeat).sketch,
    )


def policies_told(options: StudyOptions) -> Mapping[str, str]:
    """What those that were played are, in a line each."""
    return {name: f"{policy_named(name).models}. Left out: {policy_named(name).leaves_out}." for name in options.policies}
