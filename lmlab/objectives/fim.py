"""Fill in the middle: a causal model learns to write what belongs between two parts of a text.

Shapes: T positions of one text, N = T - 1 scored positions.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le, Len
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.errors import UserError
from lmlab.objectives import Example
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import random_words, uniform


class FillInTheMiddle(CausalLM):
    """Next-token prediction of documents whose middle was moved to their end (Bavarian et al. 2022, section 3).

    Each document of a block is rewritten with probability `rate`. It is cut at two positions, drawn uniformly and
    independently, into prefix, middle and suffix, any of which may be empty. Sentinel tokens, special tokens of the
    tokenizer, mark where each part begins. The order is prefix, suffix, middle (PSM), or with probability `spm_rate`
    suffix, prefix, middle (SPM), in the form that the paper uses where a model is trained on both. The end-of-text
    token stays at the end, where it tells the model that the middle is complete.

    ```
    document   The  cat  sat  on  the  mat  </s>             cut before "sat" and before "the"
    PSM        <PRE>  The  cat  <SUF>  the  mat  <MID>  sat  on  </s>
    SPM        <PRE>  <SUF>  the  mat  <MID>  The  cat  sat  on  </s>
    ```

    This is the paper's context-level form: blocks are cut before documents are rewritten, so a document that runs
    across blocks is one in each. Documents lie between end-of-text tokens; without one, the whole block is a document.
    The sentinels make a block longer, and its last tokens are dropped to keep its length. Cuts are between tokens, and
    not between characters as in the paper's best form, because text is tokenized before.

    What happens to a document is a pure function of the key and of its number in the block.
    """

    held_out = CausalLM
    """Held-out text is scored as it is, token by token: so perplexity is exact, and that of a causal run too."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rate: Annotated[float, Ge(0), Le(1)] = 0.9,
        spm_rate: Annotated[float, Ge(0), Le(1)] = 0.5,
        sentinels: Annotated[Sequence[str], Len(3, 3)] = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ):
        """Checks the tokenizer.

        Args:
            tokenizer: has the sentinel tokens.
            rate: share of the documents that are rewritten.
            spm_rate: share of these that are in the order SPM.
            sentinels: the tokens before prefix, suffix and middle, in this order.
        """
        known = tokenizer.get_vocab()
        missing = [token for token in sentinels if token not in known]
        if missing:
            raise UserError(
                f"objective=fim marks the parts of a text by tokens that this tokenizer lacks: {', '.join(missing)}.\n"
                "tokenizer=bpe and tokenizer=char are trained with them. Code models such as StarCoder, CodeLlama and "
                "Qwen2.5-Coder have some:\nname theirs by objective.sentinels=[PREFIX,SUFFIX,MIDDLE], each in quotes."
            )
        if len(set(sentinels)) < 3:
            raise UserError(f"objective.sentinels={[*sentinels]}: they have to be three different tokens.")
        self.rate, self.spm_rate, self.sentinels = rate, spm_rate, tuple(sentinels)
        self.sentinel_ids = [np.array([known[token]], np.int32) for token in sentinels]
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
        self.end_id = next((token for token in ends if token is not None), -1)

    def __call__(
        self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0, documents: np.ndarray | None = None
    ) -> Example:
        """Returns the example of a text: see `Objective` and `make_example`."""
        ends = np.flatnonzero(ids == self.end_id)
        if documents is not None:  # which may have no end-of-text token, or begin with one
            last = np.cumsum(documents) - 1
            ends = np.where(ids[last] == self.end_id, last, last + 1)
            cuts = np.stack([ends, last + 1], axis=1).ravel()[:-1]
        else:
            cuts = np.stack([ends, ends + 1], axis=1).ravel()
        parts = np.split(ids, cuts)  # documents and end-of-text tokens in turn
        words = random_words(key, first, len(parts[::2])).T
        parts[::2] = [self.rewrite(document, drawn) for document, drawn in zip(parts[::2], words, strict=True)]
        inputs = np.concatenate(parts)[: len(ids)]
        if documents is None:
            return super().__call__(inputs, key)
        lengths = np.array([len(document) + len(end) for document, end in zip(parts[::2], parts[1::2], strict=True)])
        edges = np.cumsum(lengths).clip(max=len(ids))
        positions = np.delete(np.arange(len(ids)), edges[np.diff(edges, prepend=0) > 0] - 1)
        return Example(inputs, positions, inputs[positions + 1], documents=np.diff(edges, prepend=0))

    def rewrite(self, document: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Returns a document as it is trained on.

        Args:
            document: [T] ids.
            words: [4] random words: whether it is rewritten, the two cuts, and the order.
        """
        if len(document) == 0 or uniform(words[0]) >= self.rate:
            return document
        one, two = sorted(int(word) % (len(document) + 1) for word in words[1:3])
        before, middle, after = document[:one], document[one:two], document[two:]
        prefix, suffix, mid = self.sentinel_ids
        if uniform(words[3]) < self.spm_rate:
            return np.concatenate([prefix, suffix, after, mid, before, middle])
        return np.concatenate([prefix, before, suffix, after, mid, middle])

    def sample(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, str]:
        """Returns a block's beginning as text without its middle third, and that text with the middle written."""
        from lmlab.models.generation import beginning, generate

        tokens = beginning(model, tokenizer, ids)
        third = len(tokens) // 3
        before, after = tokenizer.decode(tokens[:third]), tokenizer.decode(tokens[2 * third :])
        prefix, suffix, mid = self.sentinels
        text = " ".join(f"{prefix}{before}{suffix}{after}{mid}".split())
        return text, generate(model, tokenizer, text, 0, max_new_tokens=40)[0]
