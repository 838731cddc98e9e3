"""Scores of any bytes one likes, and the best that can be made of them by trying everything."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from spotserve.core.cluster import DeviceId
from spotserve.core.plan import Slot
from spotserve.migration.scores import Scores

Matrix = Sequence[Sequence[int]]


def scores(found: Matrix, slots: Sequence[Slot], devices: Sequence[DeviceId], *, allowed=None, fetch=None) -> Scores:
    """A row for each of `slots` and a column for each of `devices`, in any order."""
    rows = sorted(range(len(slots)), key=lambda row: slots[row])
    columns = sorted(range(len(devices)), key=lambda column: devices[column])

    def arranged(matrix, kind) -> np.ndarray:
        return np.array(matrix, dtype=kind).reshape(len(slots), len(devices))[rows][:, columns]

    return Scores(
        tuple(slots[row] for row in rows),
        tuple(devices[column] for column in columns),
        np.arange(len(slots)),
        arranged(found, np.int64),
        arranged(np.zeros_like(found) if fetch is None else fetch, np.float64),
        arranged(np.ones_like(found) if allowed is None else allowed, np.bool_),
    )


def total(made: Scores, devices: Mapping[Slot, DeviceId]) -> int:
    """Bytes that an assignment reuses."""
    return sum(
        int(made.found_bytes[made.kinds[made.slots.index(slot)], made.devices.index(device)]) for slot, device in devices.items()
    )


def every_assignment(made: Scores):
    """All assignments of as many slots as there are allowed devices for."""
    best: list[list[tuple[int, int]]] = [[]]
    rows, columns = range(len(made.slots)), range(len(made.devices))
    if len(rows) <= len(columns):
        every = (list(zip(rows, chosen, strict=True)) for chosen in itertools.permutations(columns, len(rows)))
    else:
        every = (list(zip(chosen, columns, strict=True)) for chosen in itertools.permutations(rows, len(columns)))
    for pairs in every:
        kept = [(row, column) for row, column in pairs if made.allowed[made.kinds[row], column]]
        if len(kept) > len(best[0]):
            best = [kept]
        elif len(kept) == len(best[0]):
            best.append(kept)
    return [{made.slots[row]: made.devices[column] for row, column in pairs} for pairs in best]
