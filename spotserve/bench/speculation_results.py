"""What `spotserve.bench.speculation` found, as one document and as a table."""

import msgspec


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one load on one kind of text."""

    kind: str
    concurrency: int
    policy: str
    output_tokens_per_s: float
    """Over all rounds, prompts included."""
    speedup: float
    """Time that plain decoding took for the same prompts, over the time that this took."""
    paired_speedups: tuple[float, ...] = ()
    """Of each round."""


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    model: str
    draft_model: str | None
    dtype: str
    device: str
    threads: int
    temperature: float
    rounds: int
    policies: tuple[str, ...]
    altered: dict[str, int]
    """By policy, answers that differ from plain decoding's: near ties of float arithmetic."""
    points: tuple[Point, ...]

    def point(self, kind: str, concurrency: int, policy: str) -> Point:
        """The one of these."""
        return next(p for p in self.points if (p.kind, p.concurrency, p.policy) == (kind, concurrency, policy))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of text, in order."""
        return tuple(dict.fromkeys(point.kind for point in self.points))

    @property
    def loads(self) -> tuple[int, ...]:
        """In order."""
        return tuple(dict.fromkeys(point.concurrency for point in self.points))

    def table(self) -> str:
        """Speedups over plain decoding; tokens per second of plain decoding itself."""
        lines = []
        for kind in self.kinds:
            lines.append(f"{kind:<16}" + "".join(f"{f'{load} client' + 's' * (load > 1):>14}" for load in self.loads))
            for policy in self.policies:
                cells = []
                for load in self.loads:
                    point = self.point(kind, load, policy)
                    cells.append(f"{point.output_tokens_per_s:.0f} tok/s" if policy == "off" else f"{point.speedup:.2f} x")
                lines.append(f"  {policy:<14}" + "".join(f"{cell:>14}" for cell in cells))
        return "\n".join(lines)
