"""Replaced token detection: a discriminator learns which tokens of a text a generator has replaced.

Shapes: B rows, T positions, N scored positions of the batch, K of them hidden, R of these, V vocabulary.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmlab.objectives import Example
from lmlab.objectives.mlm import mask_id, random_words, some, uniform

if TYPE_CHECKING:
    from lmlab.models.electra import GeneratorAndDiscriminator
    from lmlab.models.loss import Scores


class ReplacedTokenDetection:
    """ELECTRA's pretraining (Clark et al. 2020, section 2).

    A share of the tokens of a text is hidden. The generator, a masked model, learns to predict them. A token that is
    drawn from its prediction is put in the place of each, and the discriminator learns for every token whether it is
    another one than that of the text:

    ```
    tokens                      The    chef   cooked   the    meal
    inputs of the generator     <mask> chef   <mask>   the    meal      learns: The, cooked
    inputs of the discriminator The    chef   ate      the    meal      learns: 0  0  1  0  0
    ```

    The loss is the mean nll per hidden token of the generator, plus `discriminator_weight` times the mean nll per token
    of the discriminator, whose gradient does not reach the generator. Held-out text is scored by the discriminator. Its
    "detection perplexity" is 2 for one that tosses a coin, and 1 for one that is always right; the better the
    generator, the harder the task, so it can be compared only between runs with generators that are as good.

    Which tokens are hidden, and the random number by which the token in place of each is drawn, are a pure function of
    the key.
    """

    metric = "detection_perplexity"
    auto_class = "AutoModelForPreTraining"
    bidirectional = True
    target_shift = 0
    writes = "detect"
    last_weights = True  # the generator gets better too

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_probability: Annotated[float, Gt(0), Lt(1)] = 0.15,
        discriminator_weight: Annotated[float, Ge(0)] = 50.0,
    ):
        """Checks that the tokenizer has a mask token.

        Args:
            mask_probability: the share of the tokens that are hidden; of a text of T tokens ⌈share · T⌉.
            discriminator_weight: the factor of the discriminator's loss; the generator's has 1.
        """
        self.mask_id, self.tokens = mask_id(tokenizer), len(tokenizer)
        self.mask_probability, self.discriminator_weight = mask_probability, discriminator_weight
        self.special = np.isin(np.arange(self.tokens), tokenizer.all_special_ids)
        """[V] bool: the special tokens, which are not hidden."""

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        """Returns the example of a text: see `Objective`. Every token is a target, of the discriminator."""
        words = random_words(key, first, len(ids))
        candidates = np.flatnonzero(~self.special[ids])
        count = min(math.ceil(self.mask_probability * len(ids)), len(candidates))
        hidden = candidates[some(words[0, candidates], count)]
        inputs, weights, draws = ids.copy(), np.zeros(len(ids)), np.full(len(ids), -1.0)
        inputs[hidden] = self.mask_id
        weights[hidden] = len(ids) / max(1, count)  # so that their sum is that of the tokens
        draws[hidden] = uniform(words[1, hidden])
        return Example(inputs, np.arange(len(ids)), ids, weights, draws=draws)

    def losses(
        self, model: "GeneratorAndDiscriminator", batch: Any, chunk_size: int | None = None, scale: Tensor | None = None
    ) -> "Scores":
        """Returns the losses of a batch: the discriminator's nll of each token, and the generator's as the auxiliary.

        The arguments are those of `Objective.losses`.
        """
        from lmlab.models.loss import Scores, score
        from lmlab.models.probe import forward

        hidden, weights = batch.hidden, getattr(batch, "weights", None)
        positions, targets = batch.positions[hidden], batch.targets[hidden]
        drawn, draws = torch.empty_like(targets), batch.draws.float()

        def draw(part: slice, logits: Tensor) -> None:
            drawn[part] = draw_tokens(logits[:, : self.tokens], draws[part])

        generator = score(
            model.generator,
            batch.input_ids,
            batch.attention_mask,
            positions,
            targets,
            chunk_size,
            scale,
            None if weights is None else weights[hidden],
            document_positions=batch.document_positions,
            observe=draw,
        )
        replaced = batch.targets.index_copy(0, hidden, drawn)  # [N]
        ids = batch.input_ids.flatten().index_copy(0, batch.positions, replaced).view_as(batch.input_ids)
        output = forward(model.discriminator, ids, batch.attention_mask, None, batch.document_positions)
        logits = output.logits.flatten()[batch.positions].float()
        labels = (replaced != batch.targets).float()
        nll = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return Scores(nll.detach(), generator.nll.sum() / max(1, len(labels)), self.discriminator_weight * nll)

    def sample(
        self, model: "GeneratorAndDiscriminator", tokenizer: PreTrainedTokenizerBase, ids: list[int]
    ) -> tuple[str, str]:
        """Returns a block's beginning with another token in its middle, and what the discriminator finds replaced."""
        from lmlab.models.generation import beginning, detect

        tokens = beginning(model, tokenizer, ids)
        if not tokens:  # those of the text are unknown ones
            return "", ""
        half = len(tokens) // 2
        shown = torch.tensor([[*tokens[:half], self.mask_id, *tokens[half + 1 :]]], device=model.device)
        logits = model(shown).logits[0, half, : self.tokens]
        logits[[*tokenizer.all_special_ids, tokens[half]]] = -torch.inf
        text = " ".join(tokenizer.decode([*tokens[:half], int(logits.argmax()), *tokens[half + 1 :]]).split())
        found = sorted(detect(model.discriminator, tokenizer, text), key=lambda token: -token["score"])[:3]
        return text, "\n".join([text, *(f"  {token['score']:.3f}  {token['token_str'].strip()}" for token in found)])


def draw_tokens(logits: Tensor, draws: Tensor) -> Tensor:
    """Returns a token [R] for each row of logits [R, V], drawn by a uniform random number in [0, 1) for each [R].

    It is the first token up to which the probabilities sum to more than that.
    """
    sums = logits.float().softmax(1).cumsum(1)
    # The last sum may be less than 1 by rounding.
    return torch.searchsorted(sums, (draws * sums[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
