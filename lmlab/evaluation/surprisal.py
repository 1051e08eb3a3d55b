"""Surprisal by word: how unexpected each word of the held-out text is to a model, a row per word.

Shapes: D documents.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lmlab.data.documents import WORDS, Documents
from lmlab.evaluation.token_scores import WhiteSpace

CORRECTION = "Pimentel and Meister 2024"
"""The name of the correction of `words_of` in a certificate."""
SCHEMA = pa.schema(
    {
        "document": pa.string(),  # the name of the document, as in the records
        "word": pa.int64(),  # the number of the word in its document, from 0
        "text": pa.string(),  # without the white space before it; empty for the end of a document
        "position": pa.int64(),  # the number of its first token in the document, from 0
        "tokens": pa.int64(),
        "nll": pa.float64(),  # in nats; null where a token of it is no target
        "nll_corrected": pa.float64(),  # see `words_of`; null where it is not known
    }
)
"""The columns of words.parquet."""


def words_of(
    documents: Documents,
    scores: Mapping[str, np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    space: WhiteSpace,
    causal: bool,
) -> pa.Table:
    """Returns a row for each word, and one for the end of each document that has a token for it.

    Words are what white space separates, with the punctuation that is attached to them. White space belongs to the word
    after it. The nll of a word is the sum of those of its tokens, so the words of a document sum to its nll.

    That is the surprisal of the tokens, and not of the word: after "can" a model may expect "'t", and only the space of
    the next token says that the word has ended. The corrected nll moves the probability of that to the word which it
    ends (Pimentel and Meister 2024, section 4; Oh and Schuler 2024):

        nll_corrected(word) = nll(word) - log P(a word ends after it) + log P(a word ended before it)

    where P is the probability of all tokens that begin with white space, and of special ones, at that position.

    Args:
        scores: what `TokenScores` computes, as arrays.
        space: that of the tokenizer.
        causal: whether tokens are predicted from those before them; otherwise no word is corrected.
    """
    tokens, edges = documents.tokens, documents.edges
    first = np.zeros(len(tokens) + 1, bool)
    first[edges] = True
    first, last = first[:-1], first[1:]  # of its document
    blank_before = np.append(False, space.alone[tokens][:-1]) & ~first
    ends = documents.ends(np.arange(len(tokens)))
    # A word begins with the white space before it, where there are tokens of that alone.
    begins = first | ((ends | space.alone[tokens] | (documents.spans[:, WORDS] > 0)) & ~blank_before)
    starts = np.flatnonzero(begins)
    stops = np.append(starts[1:], len(tokens))
    document, is_end = np.searchsorted(edges, starts, side="right") - 1, ends[stops - 1]
    nll, scored = (np.add.reduceat(scores[name], starts) for name in ("nll", "scored"))
    known = scored == stops - starts
    # Where the document begins, or the token before has white space at its end, a word has ended for certain.
    certain = first | np.append(True, space.last[tokens][:-1])
    ended = np.where(certain, 0.0, scores["boundary"])
    after, next_scored = (np.append(values, 0)[stops] for values in (ended, scores["scored"]))
    final = last[stops - 1]
    corrected = nll + ended[starts] - np.where(final, 0.0, after)
    # A document without a token for its end does not say that its last word has ended.
    corrected_known = known & np.where(final, is_end, next_scored > 0) & causal
    ids = [tokens[start:stop].tolist() for start, stop in zip(starts, stops - is_end, strict=True)]
    texts = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    names = documents.names.take(np.flatnonzero(np.array(documents.parts) == 0))
    columns: dict[str, Any] = {
        "document": names.take(document).combine_chunks(),
        "word": np.arange(len(starts)) - np.searchsorted(document, document),
        "text": [text.strip() for text in texts],
        "position": starts - edges[document],
        "tokens": stops - starts,
        "nll": pa.array(nll, mask=~known),
        "nll_corrected": pa.array(corrected, mask=~corrected_known),
    }
    return pa.table(columns, SCHEMA)
