"""The page of live runs: the same as that of simulated ones, made of what clients and the fleet said."""

from collections.abc import Mapping, Sequence

from spotserve.config import LocalCloudSettings
from spotserve.replay.case import Case
from spotserve.replay.compare import Comparison
from spotserve.replay.lived import lived
from spotserve.replay.measures import measure
from spotserve.replay.page import Facts, page
from spotserve.replay.record import RunRecord
from spotserve.replay.sketch import NUM_BINS, sketch
from spotserve.replay.summary import Objectives, Summary, summarise


def full_summary(
    run: RunRecord, comparisons: Sequence[Comparison] = (), *, prices: LocalCloudSettings, objectives: Objectives
) -> Summary:
    """All that is measured of any replay, and what only a live run has: whether answers were the same, and what clients noticed."""
    return {
        **measure(lived(run, prices), objectives),
        **summarise(run, comparisons, prices=prices, objectives=objectives),
    }


def live_cases(runs: Mapping[str, tuple[RunRecord, Summary]], prices: LocalCloudSettings) -> list[Case]:
    """Passes over a timeline as columns of a report."""
    return [
        Case(
            name=name,
            policy=name,
            rate_scale=1.0,
            summaries=(summary,),
            summary=summary,
            sketch=sketch(lived(run, prices), NUM_BINS),
        )
        for name, (run, summary) in runs.items()
    ]


def live_page(cases: Sequence[Case], options: Mapping[str, object], traces: Mapping[str, str]) -> str:
    """The page."""
    told = {name: value for name, value in options.items() if name not in ("out", "url")}
    facts = Facts(
        title="Replay against a running system",
        described=", ".join(traces),
        command="",
        config={**told, **{f"sha256 of {name}": checksum for name, checksum in traces.items()}},
    )
    return page(cases, facts)
