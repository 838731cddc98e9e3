"""A study as text: policies side by side. Says nothing that the summary does not."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from spotserve.replay.case import Case
from spotserve.replay.report_rows import HEADLINE, SECTIONS, best, cell, known_rows

_MUST_BE_ZERO = ("requests_lost", "tokens_altered", "tokens_contradicted")


def study_tables(cases: Sequence[Case], *, is_whole: bool = False) -> Iterator[tuple[str, Table]]:
    """A table for each load, with its title: empty where there is one load."""
    rates = list(dict.fromkeys(case.rate_scale for case in cases))
    for rate in rates:
        title = f"{rate:g} times the trace's rate" if len(rates) > 1 else ""
        yield title, study_table([case for case in cases if case.rate_scale == rate], is_whole=is_whole)


def study_table(cases: Sequence[Case], *, is_whole: bool = False) -> Table:
    """One column for each case, with half the interval's width behind ± where there are repeats; all rows, or the first ones."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("")
    for case in cases:
        shown.add_column(case.name, justify="right")
    for section, rows in (SECTIONS if is_whole else {"": HEADLINE}).items():
        known = known_rows(rows, cases)
        if section and known:
            shown.add_row()
            shown.add_row(Text(section, style="bold"))
        for row in known:
            top = best(row, cases)
            cells = [Text(cell(row, case), style=_style(row.key, case, is_best=case.name in top)) for case in cases]
            shown.add_row(f"  {row.title}" if section else row.title, *cells)
    return shown


def _style(key: str, case: Case, *, is_best: bool) -> str:
    if key in _MUST_BE_ZERO:
        return "bold red" if case.summary.get(key) else "green"
    return "bold" if is_best else ""
