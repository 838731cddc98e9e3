"""How many machines to hold where nobody has said: the fewest that are enough, asked of the planner."""

from dataclasses import dataclass
from math import inf

import pytest
from pydantic import ValidationError

from spotserve.config import ControllerSettings
from spotserve.controller.sizing import Sizing
from spotserve.planner.workload import Latency, Lengths, Objective, Workload

NO_LIMITS = Objective()
LOAD = Workload(1.0, Lengths.fixed(10), Lengths.fixed(10))


@dataclass
class Chooser:
    """Answers as a planner would whose latencies fall as machines are added."""

    first_s: float = 12.0
    needed: int = 3
    objective: Objective = NO_LIMITS
    load: Workload = LOAD
    blind: str | None = None
    asked: int = 0

    def blindness(self) -> str | None:
        return self.blind

    def believed(self, now_s: float) -> Workload:
        return self.load

    def prospect(self, num_machines: int, now_s: float) -> Latency:
        self.asked += 1
        if num_machines < self.needed:
            return Latency(inf, inf, inf, inf, inf, inf, inf)
        p99_s = 10.0 + (self.first_s - 10.0) * 2.0 ** (self.needed - num_machines)
        return Latency(1.0, 1.0, 0.1, 0.1, p99_s, p99_s, 0.5 * self.needed / num_machines)


@pytest.mark.parametrize(
    ("chooser", "expected"),
    [
        (Chooser(), 3),
        (Chooser(first_s=40.0), 7),
        (Chooser(first_s=40.0, objective=Objective(e2e_s=30.0)), 4),
        (Chooser(objective=Objective(e2e_s=5.0)), 20),
        (Chooser(needed=99), 20),
        (Chooser(blind="no worker has said yet what the model is"), 1),
    ],
)
def test_the_fewest_that_are_enough(chooser: Chooser, expected: int) -> None:
    assert Sizing(chooser, least=1, most=20).wanted(0.0) == expected  # type: ignore[arg-type]


def test_nothing_is_asked_again_while_the_load_is_the_same() -> None:
    chooser = Chooser()
    sizing = Sizing(chooser, least=1, most=20)  # type: ignore[arg-type]
    assert sizing.wanted(0.0) == sizing.wanted(9.0)
    asked = chooser.asked
    chooser.load = Workload(2.0, LOAD.prompt, LOAD.output)
    sizing.wanted(10.0)
    assert chooser.asked == asked, "machines cannot follow so fast"
    sizing.wanted(70.0)
    assert asked <= 7 and chooser.asked == 2 * asked


def test_only_the_planner_can_size_a_fleet() -> None:
    assert ControllerSettings.model_validate({"planning": "auto", "instances": "auto"}).instances == "auto"
    with pytest.raises(ValidationError, match="planning"):
        ControllerSettings.model_validate({"instances": "auto"})
    with pytest.raises(ValidationError):
        ControllerSettings.model_validate({"instances": 0})
