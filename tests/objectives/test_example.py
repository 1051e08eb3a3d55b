"""An example that an objective must not return is refused wherever one is made, by what is wrong with it."""

from typing import Any

import numpy as np
import pytest

from lmlab.data.datamodule import collate
from lmlab.data.sampler import Draw
from lmlab.data.tokenizers import bpe
from lmlab.errors import UserError
from lmlab.objectives import Example, make_example, sentinel
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.diffusion import MaskedDiffusion
from lmlab.objectives.electra import ReplacedTokenDetection
from lmlab.objectives.fim import FillInTheMiddle
from lmlab.objectives.mlm import MaskedLM
from lmlab.objectives.prefix import PrefixLM
from lmlab.objectives.span import SpanCorruption

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


FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
TOKENIZER = bpe(["some words to make a few merges of"], 400, [*FIM, *map(sentinel, range(20))])
LENGTHS = np.array([30, 1, 20, 13])
"""The documents of a block."""
BLOCK = np.random.default_rng(0).integers(50, 250, 64).astype(np.int32)


def apart(objective: Any, **given: Any) -> Example:
    return make_example(objective, BLOCK, (1, 2, 3), documents=LENGTHS, **given)


def test_no_document_predicts_the_next_one() -> None:
    example = apart(CausalLM())
    assert example.documents.tolist() == LENGTHS.tolist()
    assert set(range(64)) - set(example.positions.tolist()) == {29, 30, 50, 63}
    assert (example.targets == BLOCK[example.positions + 1]).all()


def test_what_is_drawn_for_a_token_is_the_same() -> None:
    """Where a block is cut into documents moves no mask of a token; only what is counted by text does."""
    for objective in (MaskedLM(TOKENIZER), MaskedLM(TOKENIZER, whole_word=True), MaskedDiffusion(TOKENIZER)):
        continues = np.arange(64) % 3 == 1
        continues[[0, 30, 31, 51]] = False
        whole = make_example(objective, BLOCK, (1, 2, 3), continues=continues, number=7)
        example = apart(objective, continues=continues, number=7)
        assert all(np.array_equal(one, other) for one, other in zip(whole[:5], example[:5], strict=True))
    detection = apart(ReplacedTokenDetection(TOKENIZER))
    assert detection.weights.sum() == pytest.approx(64)  # every document has a hidden token
    assert [(part >= 0).sum() for part in np.split(detection.draws, np.cumsum(LENGTHS)[:-1])] == [5, 1, 3, 2]


def test_the_middle_of_a_document_stays_in_it() -> None:
    objective = FillInTheMiddle(TOKENIZER, rate=1.0)
    block, end = BLOCK.copy(), objective.end_id
    block[np.cumsum(LENGTHS) - 1] = end
    across = make_example(objective, block, (1, 2, 3))
    example = make_example(objective, block, (1, 2, 3), documents=LENGTHS)
    assert (example.inputs == across.inputs).all()  # as its documents end with their own end-of-text tokens
    ends = np.cumsum(example.documents) - 1
    assert example.inputs[ends[:-1]].tolist() == [end] * (len(ends) - 1)
    assert set(range(64)) - set(example.positions.tolist()) == {*ends.tolist()}
    # Without these tokens, documents are rewritten one by one all the same, and three sentinels are added to each.
    bare = make_example(objective, np.where(block == end, 50, block), (1, 2, 3), documents=LENGTHS)
    assert bare.documents.tolist() == [33, 4, 23, 4]


@pytest.mark.parametrize("objective", [PrefixLM(0.5, 0.9, validation_prefix_share=0), SpanCorruption(TOKENIZER)])
def test_objectives_that_need_one_text(objective: Any) -> None:
    with pytest.raises(UserError, match=r"preprocess\.document_attention=true is not for"):
        apart(objective)
