"""Span corruption: an encoder-decoder learns to write the spans that are missing in a text.

Shapes: T positions of one text, S spans hidden in it, K tokens that stay, N targets.
"""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Lt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.errors import UserError
from lmlab.objectives import Example, sentinel, sentinel_ids
from lmlab.objectives.mlm import random_words, some


class SpanCorruption:
    """T5's denoising objective (Raffel et al. 2020, section 3.1.4 and Figure 2).

    Spans of a text are hidden, each behind a sentinel token of its own. The encoder reads what is left. The decoder
    writes the spans, each after its sentinel, and a last sentinel that ends them:

    ```
    tokens           Thank  you  for  inviting  me  to  your  party  last  week
    inputs           Thank  you  <X>  me  to  your  party  <Y>  week
    decoder_inputs   <start>  <X>  for  inviting  <Y>  last
    targets            <X>    for  inviting  <Y>  last  <Z>
    ```

    The numbers of hidden tokens and of spans follow from the length of a text, as in T5: `noise_density` · T tokens in
    spans of `mean_span_length` on average. All ways to cut the hidden tokens into so many spans are equally likely, and
    so are all ways to put these between, before or after the tokens that stay, no two side by side. (T5's own code
    always keeps the first token of a text and hides the last.)

    What is hidden is a pure function of the key.
    """

    metric = "span_perplexity"  # of the targets given what is left of the text: it neither is nor bounds that of a text
    auto_class = "AutoModelForSeq2SeqLM"
    bidirectional = True
    target_shift = 0
    writes = "infill"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        noise_density: Annotated[float, Gt(0), Lt(1)] = 0.15,
        mean_span_length: Annotated[float, Ge(1)] = 3.0,
        sentinels: Annotated[int, Ge(2)] = 100,
        decoder_start: str | None = None,
    ):
        """Checks the tokenizer.

        Args:
            tokenizer: has the sentinel tokens `<extra_id_0>`, `<extra_id_1>` and so on.
            noise_density: share of the tokens that are hidden.
            mean_span_length: mean number of tokens of a span.
            sentinels: the number of sentinel tokens that are used; fewer if the tokenizer has fewer.
            decoder_start: the token that the decoder begins with. None: the padding token, as in T5.
        """
        known = tokenizer.get_vocab()
        self.sentinels = np.array(sentinel_ids(tokenizer)[:sentinels], np.int32)
        if len(self.sentinels) < 2:
            raise UserError(
                f"objective=span hides spans behind tokens that this tokenizer lacks: {sentinel(0)}, {sentinel(1)}, …\n"
                "tokenizer=bpe and tokenizer=char are trained with them, and those of T5, mT5 and UL2 have them."
            )
        start = tokenizer.pad_token if decoder_start is None else decoder_start
        if start not in known:
            lacks = "no padding token, which would be it." if start is None else f'no "{start}".'
            raise UserError(
                f"objective.decoder_start is the token that a decoder begins with: the tokenizer has {lacks}"
            )
        self.start_id = known[start]
        self.noise_density, self.mean_span_length = noise_density, mean_span_length

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        """Returns the example of a text: see `Objective`. Of a text of one token nothing is hidden."""
        # [0, where each span begins and ends in turn, T], so that what stays and what is hidden take turns too.
        edges = self.spans(len(ids), random_words(key, first, len(ids) + 1)).ravel()
        pieces, numbers = np.split(ids, edges), np.split(np.arange(len(ids)), edges)
        hidden = len(pieces) // 2
        marks, no_token = self.sentinels[: hidden + 1, None], np.full((hidden + 1, 1), -1)
        nothing = np.zeros(0, np.int32)
        inputs = alternate(pieces[::2], [*marks[:hidden], nothing])
        if not hidden:
            return Example(inputs, nothing, nothing, decoder_inputs=np.array([self.start_id], np.int32), tokens=nothing)
        targets = alternate(marks, [*pieces[1::2], nothing])
        return Example(
            inputs,
            np.arange(len(targets)),
            targets,
            decoder_inputs=np.concatenate([[self.start_id], targets[:-1]]).astype(np.int32),
            tokens=alternate(no_token, [*numbers[1::2], nothing]),
        )

    def spans(self, length: int, words: np.ndarray) -> np.ndarray:
        """Returns where each span of a text begins, and where it ends: [S, 2].

        Args:
            length: T.
            words: [4, T + 1] random words.

        Raises:
            UserError: there are more spans than sentinels.
        """
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        if noise < 1:
            return np.zeros((0, 2), np.int64)
        kept = length - noise
        spans = min(max(round(noise / self.mean_span_length), 1), kept + 1)
        if spans >= len(self.sentinels):
            raise UserError(
                f"a text of {length} tokens gets {spans} spans, for which there have to be {spans + 1} sentinels, and "
                f"there are {len(self.sentinels)}.\nSet objective.sentinels={spans + 1} or more where the tokenizer is "
                "trained, or lower preprocess.block_size, or raise objective.mean_span_length."
            )
        cuts = 1 + some(words[0, : noise - 1], spans - 1)
        lengths = np.diff(cuts, prepend=0, append=noise)
        # Before each span stand the tokens that stay up to it, and the spans before it.
        begins = some(words[1, : kept + 1], spans) + np.cumsum(lengths) - lengths
        return np.stack([begins, begins + lengths], axis=1)

    def sample(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, str]:
        """Returns a block's beginning as text with a sentinel for its middle third, and that text with it written."""
        from lmlab.models.generation import beginning, infill

        tokens = beginning(model, tokenizer, ids)
        third = len(tokens) // 3
        before, hidden, after = map(tokenizer.decode, (tokens[:third], tokens[third : 2 * third], tokens[2 * third :]))
        text = " ".join(f"{before}{' ' * hidden.startswith(' ')}{sentinel(0)}{after}".split())
        return text, infill(model, tokenizer, text, 0, max_new_tokens=40)[0]


def alternate(one: "list[np.ndarray] | np.ndarray", other: list[np.ndarray]) -> np.ndarray:
    """Returns arrays end to end, one of each list in turn."""
    return np.concatenate([part for pair in zip(one, other, strict=True) for part in pair])
