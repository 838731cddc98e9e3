"""The adaptive speculator in a steady state: never slower than plain decoding, and close to the best fixed length wherever one is.

Tokens are counted as expected of the lengths that were verified, so that luck does not hide what was decided.
"""

import pytest
from scenes import CPU, GPU, Scene, best_fixed_goodput, expected_goodput, fixed_goodput

from spotserve.speculation.cost import StepCost

WARM_UP = {1: 350, 8: 200, 64: 120}
STEPS = {1: 400, 8: 150, 64: 80}


@pytest.mark.parametrize("price", [0.0, 0.05, 0.3], ids=["host", "small model", "large model"])
@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("load", [1, 8, 64])
@pytest.mark.parametrize("cost", [GPU, CPU], ids=["gpu", "cpu"])
def test_as_good_as_the_best_fixed_length(cost: StepCost, load: int, acceptance: float, price: float) -> None:
    scene = Scene(cost, load, lambda _: acceptance, price)
    scene.steps(WARM_UP[load])
    goodput = expected_goodput(scene.steps(STEPS[load]), acceptance)
    plain = fixed_goodput(cost, load, acceptance, price, 0)
    share = goodput / best_fixed_goodput(cost, load, acceptance, price)
    assert goodput >= 0.97 * plain, f"{goodput / plain:.3f} of plain decoding"
    # One stream, a dear model, and a gain of a tenth at most: a look in forty steps takes long to be sure of that.
    is_doubtful = load == 1 and price == 0.3 and acceptance == 0.5
    assert share >= (0.85 if is_doubtful else 0.95), f"{share:.3f} of the best fixed length"
