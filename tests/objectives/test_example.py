"""An example that an objective must not return is refused wherever one is made, by what is wrong with it."""

from typing import Any

import numpy as np
import pytest

from lmlab.data.datamodule import collate
from lmlab.data.sampler import Draw
from lmlab.errors import UserError
from lmlab.objectives import Example, make_example
from lmlab.objectives.clm import CausalLM

IDS = np.arange(8, dtype=np.int32)
GOOD = Example(IDS, np.arange(7), IDS[1:])


class Returns(CausalLM):
    """Returns an example that is right in the sample 0, and what it was given in all others."""

    def __init__(self, example: Any):
        self.example = example

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        returned: Example = self.example if key[2] else GOOD
        return returned


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (None, "returns a NoneType, and an Example was expected"),
        (GOOD._replace(inputs=[*IDS]), "inputs as list of shape [8], and an array of [8] was expected"),
        (GOOD._replace(positions=np.arange(7.0)), "positions of type float64, and whole numbers were expected"),
        (Example(IDS, np.ones(8, bool), IDS), "positions of type bool"),
        (GOOD._replace(positions=np.arange(7)[None]), "positions of shape [1, 7], and an array of [7] was expected"),
        (GOOD._replace(positions=np.arange(2, 9)), "positions from 2 to 8, and 0 to 7 was expected"),
        (GOOD._replace(positions=np.arange(-1, 6)), "positions from -1 to 5"),
        (GOOD._replace(targets=IDS[2:]), "targets of shape [6], and an array of [7] was expected"),
        (GOOD._replace(targets=np.where(np.arange(7) % 2, IDS[1:], -100)), "the target -100, which is no token"),
        (GOOD._replace(weights=np.ones(3)), "weights of shape [3], and an array of [7] was expected"),
        (GOOD._replace(weights=np.full(7, np.nan)), "returns weights that are not finite"),
        (GOOD._replace(divisor=3.5), "the divisor 3.5, and a whole number was expected"),
        (GOOD._replace(divisor=-1), "the divisor -1"),
    ],
)
def test_a_wrong_example_of_any_sample_is_refused(example: Any, said: str) -> None:
    objective = Returns(example)
    with pytest.raises(UserError) as refused:
        collate([IDS, IDS], [Draw(0, 0), Draw(1, 0)], objective, seed=0, pad_id=0)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "example",
    [
        tuple(GOOD[:3]),
        Example(IDS, np.zeros(0, np.int64), np.zeros(0, np.int64)),
        GOOD._replace(weights=np.arange(7), divisor=np.int64(0)),
    ],
)
def test_examples_that_are_taken(example: Any) -> None:
    made = make_example(Returns(example), IDS, (0, 0, 1))
    assert all(np.array_equal(one, other) for one, other in zip(made[:3], example[:3], strict=True))
