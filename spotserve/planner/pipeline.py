"""How long stages take together: closed forms of a pipeline, each exact for what it assumes.

A link between two stages is a station of its own: it carries one message while the stages compute the next. Pure arithmetic on
seconds; does not know what a stage computes.
"""

from collections.abc import Sequence


def cycle_s(stations_s: Sequence[float], groups: float) -> float:
    """Between two tokens of one sequence when `groups` groups of sequences go round through all stations.

    Exact for groups alike: either a group is alone with its way round, or the slowest station serves one group after the other.
    With stages alike and as many groups this is P * t (planning of a decode step after Orca, OSDI'22). `groups` may be a mean.
    """
    return max(sum(stations_s), groups * max(stations_s))


def makespan_s(slices_s: Sequence[Sequence[float]]) -> float:
    """Until all slices are through all stations; `slices_s[i][k]` is the time of slice i at station k. Slices keep their order.

    Exact for any times (a permutation flow shop). With slices alike it is sum + (m - 1) * max over stations, with stages alike
    sum + (P - 1) * max over slices (TeraPipe, ICML'21).
    """
    done_s = [0.0] * len(slices_s[0])
    for slice_s in slices_s:
        before_s = 0.0
        for station, seconds in enumerate(slice_s):
            before_s = max(before_s, done_s[station]) + seconds
            done_s[station] = before_s
    return done_s[-1]
