"""Whether learned hazards predict losses: rolling prediction on public traces, against two baselines.

    python benchmarks/hazard.py [--json]

Once a minute, on what was seen until then, every predictor says how many instances are taken in the next 2, 10 and 60 minutes.
Scores, means over all minutes in which something was alive: the logarithm of the probability of what happened (higher is better; no
count is given less than 1e-6) and the Brier score of "anything is taken" (lower is better). The 60-minute windows overlap 60-fold:
an 11-hour trace holds 10 independent ones, so differences there mean little.

* book: `HazardBook`, as it comes
* calm book: the same without the effect that a loss has on those after it
* prior: the constant that `HazardBook` starts from, with its groups; never learns
* last hour: as many losses per instance-hour as in the last hour, single ones; never below 0.01
* last hour, groups: the same rate, in groups as the prior has them
* no change: nothing is ever taken

The prior was chosen from these very G4dn figures, so "prior" is favoured on that trace, and so is the book's start.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import log

from spot_series import Series, data_folder, public_series

from spotserve.planner.cell_book import HazardPrior
from spotserve.planner.hazard import HazardBook
from spotserve.planner.risk import Sizes, mean_size, taken

HORIZONS_S = (120.0, 600.0, 3600.0)
_STEP_S = 60.0
_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class Score:
    """Means over the moments of prediction."""

    log_likelihood: float
    brier: float


@dataclass(frozen=True, slots=True)
class Moment:
    """What a predictor may look at, and what then happened."""

    now_s: float
    num_alive: int
    recent_losses: int
    recent_instance_hours: float


Predictor = Callable[[Moment, float], list[float]]
"""(moment, horizon in seconds) -> probabilities of 0, 1, .. losses."""


def walk(series: Series, books: list[HazardBook]) -> Iterator[Moment]:
    """The moments of prediction; the books know what happened until each, and nothing later."""
    changes = list(series.changes)
    alive_since: dict[str, float] = {}
    lives: list[tuple[float, float]] = []
    losses: list[float] = []
    now_s = changes[0].at_s
    while now_s < series.end_s:
        while changes and changes[0].at_s <= now_s:
            change = changes.pop(0)
            for book in books:
                if change.is_loss:
                    book.note_loss(change.instance_id, change.at_s)
                else:
                    book.note_joined(change.instance_id, "type", "zone", change.at_s)
            if change.is_loss:
                losses.append(change.at_s)
                lives.append((alive_since.pop(change.instance_id), change.at_s))
            else:
                alive_since[change.instance_id] = change.at_s
        if alive_since:
            since_s = now_s - 3600.0
            spans = [*lives, *((start_s, now_s) for start_s in alive_since.values())]
            hours = sum(max(0.0, end_s - max(start_s, since_s)) for start_s, end_s in spans) / 3600
            yield Moment(now_s, len(alive_since), sum(at_s > since_s for at_s in losses), hours)
        now_s += _STEP_S


def predictors(book: HazardBook, calm: HazardBook, prior: HazardPrior) -> dict[str, Predictor]:
    """By name; see the module."""

    def learned(which: HazardBook) -> Predictor:
        def predict(moment: Moment, horizon_s: float) -> list[float]:
            rate = which.instants_per_hour("type", "zone", moment.now_s, horizon_s)
            sizes = which.group_sizes("type", "zone", moment.now_s)
            return list(taken(rate * moment.num_alive * horizon_s / 3600, sizes, moment.num_alive))

        return predict

    def constant(moment: Moment, horizon_s: float) -> list[float]:
        expected = prior.instants_per_hour * moment.num_alive * horizon_s / 3600
        return list(taken(expected, prior.sizes, moment.num_alive))

    def last_hour(sizes: Sizes) -> Predictor:
        mean = mean_size(sizes, max(size for size, _ in sizes))

        def predict(moment: Moment, horizon_s: float) -> list[float]:
            rate = max(0.01, moment.recent_losses / max(moment.recent_instance_hours, 1e-9))
            return list(taken(rate / mean * moment.num_alive * horizon_s / 3600, sizes, moment.num_alive))

        return predict

    return {
        "book": learned(book),
        "calm book": learned(calm),
        "prior": constant,
        "last hour": last_hour(((1, 1.0),)),
        "last hour, groups": last_hour(prior.sizes),
        "no change": lambda _moment, _horizon_s: [1.0],
    }


def score(series: Series, prior: HazardPrior) -> dict[float, dict[str, Score]]:
    """Scores by horizon and predictor. Windows that the trace does not cover are left out."""
    book = HazardBook(prior)
    calm = HazardBook(replace(prior, stirred_per_hour=0.0, stirred_weight_h=1e9))
    losses = [change.at_s for change in series.changes if change.is_loss]
    sums = {horizon_s: {name: [0.0, 0.0, 0] for name in predictors(book, calm, prior)} for horizon_s in HORIZONS_S}
    for moment in walk(series, [book, calm]):
        for horizon_s in HORIZONS_S:
            if moment.now_s + horizon_s > series.end_s:
                continue
            happened = sum(moment.now_s < at_s <= moment.now_s + horizon_s for at_s in losses)
            for name, predict in predictors(book, calm, prior).items():
                shares = predict(moment, horizon_s)
                # losses of instances that join in the window are nobody's to foresee: they count as "all there are"
                told = shares[min(happened, len(shares) - 1)] if name != "no change" else float(happened == 0)
                total = sums[horizon_s][name]
                total[0] += log(max(told, _LEAST))
                total[1] += ((1 - shares[0]) - (happened > 0)) ** 2
                total[2] += 1
    return {
        horizon_s: {name: Score(likelihood / n, brier / n) for name, (likelihood, brier, n) in by_name.items() if n}
        for horizon_s, by_name in sums.items()
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    arguments = parser.parse_args()
    folder = data_folder()
    if folder is None:
        parser.exit(1, "no public traces here: set SPOTSERVE_DATA to a folder that has traces/spot/bamboo\n")
    results = {series.name: score(series, HazardPrior()) for series in public_series(folder)}
    if arguments.json:
        rows = [
            {"trace": trace, "horizon_s": horizon_s, "predictor": name, "log_likelihood": each.log_likelihood, "brier": each.brier}
            for trace, by_horizon in results.items()
            for horizon_s, by_name in by_horizon.items()
            for name, each in by_name.items()
        ]
        print(json.dumps(rows, indent=1))
        return
    for trace, by_horizon in results.items():
        names = list(next(iter(by_horizon.values())))
        print(f"\n{trace + ': log-likelihood / Brier':<48}" + "".join(f"{name:>18}" for name in names))
        for horizon_s, by_name in by_horizon.items():
            cells = (f"{each.log_likelihood:.3f} / {each.brier:.3f}" for each in by_name.values())
            print(f"{f'  next {horizon_s / 60:.0f} min':<48}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
