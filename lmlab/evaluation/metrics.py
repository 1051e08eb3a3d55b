"""Computes perplexity and bits per byte from exact sums over every scored token (promise 2).

Shapes: S stretches (parts of documents, or whole ones).
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmlab.data.documents import COUNTS

EXACT, BOUND = "perplexity", "bound_perplexity"
"""The names of the perplexity of a text, and of an upper bound of it. A metric of any other name is neither."""
DETECTION = "detection_perplexity"
"""The name of that of a discriminator: of whether a token is the text's, or one that its own generator has put in."""
OF_GENERATORS = "Each model was scored on tokens of its own generator: compare only those whose generators are alike."
"""The warning beside a comparison by `DETECTION`: the better a generator, the harder its tokens are to find."""
NATS_PER_UNKNOWN_BYTE = math.log(256)
"""The charge for each byte that an unknown token stands for: 8 bits, in nats."""
WORDS = {
    "text": "A word is what stands between white space. The end of a document counts as one where its nll is scored.",
    "words": "A word is what stands between white space. The end of a line counts as one where its nll is scored, that "
    "of the line feed or, behind a last line without one, of the end of the document. So counts the literature on PTB "
    "and WikiText.",
}
"""The definitions of a word, by the config key `units` (docs/measure.md, "Words")."""


def metric_prefix(metric: str) -> str:
    """Returns what the names of metrics begin with beside a perplexity of a name: "masked_" for masked_perplexity."""
    return metric.removesuffix("perplexity") if metric.endswith("perplexity") else f"{metric}_"


def perplexity(nll: float) -> float:
    """Returns exp(nll) of a mean nll in nats; infinite where that is beyond a float.

    A model that gives k tokens the same probability each time has a mean nll of ln k, and so a perplexity of k: it is
    the number of tokens that a model is undecided between (Jelinek et al. 1977). As a token of one tokenizer is more
    text than one of another, perplexities can be compared only if the tokenizer is the same.
    """
    import torch  # whose exp all certificates were made with; a comparison that is refused need not wait for it

    return float(torch.tensor(nll, dtype=torch.float64).exp())


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Returns the ends of the 95 % interval of a share (Wilson 1927, "Probable Inference, the Law of Succession, and
    Statistical Inference", Journal of the American Statistical Association 22).

    It is for few trials too, and lies within 0 to 1 also where all succeed or none.

    Args:
        successes: their number, in which a tie counts half.
    """
    z, share = 1.959964, successes / trials
    middle = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = ((middle + sign * half) / (1 + z**2 / trials) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def sum_totals(nll: np.ndarray, counts: np.ndarray, stretches: np.ndarray | None = None) -> dict[str, Any]:
    """Returns the totals of `DocumentSums`, exactly rounded, whatever the order of the rows.

    Args:
        nll: [S, 2] float64: the Σ nll and Σ nll² of each row.
        counts: [S, 7] int64: the `documents.COUNTS` of each row.
        stretches: [S] the number of each row within its document, from 0; None if each is a whole document.
    """
    scored = counts[:, 0] > 0
    if stretches is not None:
        scored = np.logical_or.reduceat(scored, np.flatnonzero(stretches == 0))
    return {
        "documents": len(scored),
        "documents_scored": int(scored.sum()),
        "nll": math.fsum(nll[:, 0]),
        "nll_squared": math.fsum(nll[:, 1]),
        **{name: int(column.sum()) for name, column in zip(COUNTS, counts.T, strict=True)},
    }


def compute_metrics(
    totals: Mapping[str, Any], name: str = "perplexity", sample: float | None = None, units: str = "text"
) -> dict[str, float | None]:
    """Returns the metrics of `sum_totals`; a metric is None if its divisor is 0.

    nll per token is what a model is trained on, and depends on the tokenizer: of longer tokens there are fewer, and
    each is harder to predict. To get rid of it, the nll of *all* tokens is divided by something that the text alone
    decides. Bits per byte are

    ```
    Σ nll / ln 2        bits that the model needs to encode the scored text
    ─────────────
      Σ bytes           UTF-8 bytes of that text: a token that is not scored takes its bytes along
    ```

    and so is the compression that the model would reach: 8 bits per byte are none, 1 is what good models reach on
    English prose. Bits per word, and the perplexity per word (2 to that power), are the same with words below the line.

    An unknown token does not spell its text, and its nll is no code for that text. Per byte and per word it is
    therefore charged 8 bits more for each byte that it stands for. The text could be sent that way, so the metric is an
    upper bound of what a tokenizer that spells everything would give with this model.

    A `BOUND` is estimated by random draws, and gets the standard error that is due to them.

    Args:
        totals: the totals of any version of records; a total that is missing counts as 0.
        name: the name of the perplexity, such as `masked_perplexity`. The other metrics get the same prefix, so that
            none of them has the name of a causal model's.
        sample: the share of the tokens that was scored, if it was a random one; nll per token and perplexity then get
            a standard error (Cochran 1977, section 2.11, for a ratio).
        units: the key of `WORDS` that says what counts as a word.
    """
    prefix = metric_prefix(name)
    count = Counter(totals)
    nats = count["nll"] + NATS_PER_UNKNOWN_BYTE * count["unknown_bytes"]
    words = count["words"] + count["ends" if units == "text" else "lines"]
    mean = count["nll"] / count["tokens"] if count["tokens"] else None
    per_byte, per_word = (nats / number if number else None for number in (count["bytes"], words))
    metrics = {
        "nll_per_token": mean,
        name: None if mean is None else perplexity(mean),
        f"{prefix}bits_per_byte": None if per_byte is None else per_byte / math.log(2),
        f"{prefix}bits_per_word": None if per_word is None else per_word / math.log(2),
        f"{prefix}word_perplexity": None if per_word is None else perplexity(per_word),
    }
    if sample is not None and mean is not None:
        variance = max(0.0, totals["nll_squared"] / totals["tokens"] - mean**2)
        error = math.sqrt((1 - sample) * variance / max(1, totals["tokens"] - 1))
        metrics |= {"nll_per_token_standard_error": error, f"{name}_standard_error": perplexity(mean) * error}
    if name == BOUND and mean is not None:
        error = math.sqrt(totals["nll_squared"])
        metrics |= {
            "nll_per_token_standard_error": error / count["tokens"],
            f"{name}_standard_error": perplexity(mean) * error / count["tokens"],
            f"{prefix}bits_per_byte_standard_error": error / count["bytes"] / math.log(2) if count["bytes"] else None,
        }
    return metrics
