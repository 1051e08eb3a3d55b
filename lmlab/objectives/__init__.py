"""The interface of an objective: which tokens a model has to predict, and what follows from that.

Shapes: T positions of one text, U of what a decoder beside an encoder reads, N scored positions in it.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from lmlab.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lmlab.models.loss import Scores

OBJECTIVE_OF = {
    "AutoModelForCausalLM": "clm",
    "AutoModelForMaskedLM": "mlm",
    "AutoModelForSeq2SeqLM": "span",
    "AutoModelForPreTraining": "electra",
}
"""The objective (a file of conf/objective/) that suits a trained model of each `AutoModel` class, where a command
does not name one."""


def sentinel(number: int) -> str:
    """Returns the name of the token that stands for a hidden span in T5's tokenizers; numbers begin with 0."""
    return f"<extra_id_{number}>"


def sentinel_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Returns the ids of the sentinels that a tokenizer has, from 0 on up to the first that it lacks."""
    known = tokenizer.get_vocab()
    return [known[name] for name in takewhile(known.__contains__, map(sentinel, count()))]


class Example(NamedTuple):
    """The inputs that a model is given for one text, and the targets that it has to predict."""

    inputs: np.ndarray
    """The ids that the model reads, [T]; of an encoder-decoder the encoder."""
    positions: np.ndarray
    """The positions whose output is scored, ascending, [N]; of an encoder-decoder those of its decoder."""
    targets: np.ndarray
    """The id that has to be predicted at each of these positions, [N]."""
    weights: np.ndarray | None = None
    """The factor of the nll of each target in the loss, [N]; None is 1 for each."""
    divisor: int | None = None
    """The number of tokens that the weighted sum stands for: the loss of a batch is the sum over its examples, divided
    by the sum of their divisors. None is N, so that the loss is the mean nll per target."""
    prefix: int = 0
    """The number of first positions that every position may attend to, besides those before it and itself: 0 for causal
    attention, T for attention in both directions. It is for decoders: an encoder attends in both directions anyway."""
    decoder_inputs: np.ndarray | None = None
    """The ids that the decoder of an encoder-decoder reads, [U]; None for other models."""
    tokens: np.ndarray | None = None
    """The number of each target among the given ids, [N]; -1 for one that is no token of the text, such as a sentinel.
    None is the scored position and `Objective.target_shift`."""
    draws: np.ndarray | None = None
    """The random numbers of a generator, which fills in some of the tokens, [N]: for each target a uniform one in
    [0, 1) by which its token is drawn, and -1 where the text's own token stays. None without a generator."""
    documents: np.ndarray | None = None
    """The number of positions of each document in the inputs, in their order, where a position attends only to those of
    its own document (`preprocess.document_attention`). None is one text."""


class Objective(Protocol):
    """Turns the tokens of a text into an `Example`, and says what the model and the metric have to be.

    Two of those that come with lmlab, on the text "The cat sat on":

    ```
                 CausalLM                     MaskedLM
    tokens       The   cat   sat   on         The    cat     sat    on
    inputs       The   cat   sat   on         The   <mask>   sat    on
    positions     0     1     2                       1
    targets      cat   sat   on                      cat
    ```

    Any class with these members is one; it need not derive from this. Its constructor takes the keys of its YAML, and
    the tokenizer where it has a parameter of that name. Its `__call__` may have more parameters, and is given what it
    has a parameter for: see `make_example`. It may lack the members that have a value here.
    """

    metric: str
    """The name of exp(mean nll per target), which says what it measures. "perplexity" is that of the text: every token
    is scored, but for the first of a block (with document attention, of a document), and the model never sees it.
    "bound_perplexity" is an upper bound of that. Any other name, such as "masked_perplexity", is neither, and compared
    only with others of its name."""
    auto_class: str
    """The class of transformers that makes its models, such as "AutoModelForCausalLM"."""
    bidirectional: bool
    """True if the model may see the tokens after a position. Then each document is framed by the tokenizer's special
    tokens and cut into pieces; otherwise held-out text can be scored in windows that overlap. An encoder-decoder may:
    its encoder sees all that it is given."""
    target_shift: int
    """The number of positions that a target stands after its scored position in the text: 1 for the next token, 0 for
    the token itself."""

    score: Literal["labels", "elbo"] = "labels"
    """The scores of held-out text, as the key `score` of an evaluation: labels are the targets of the examples, elbo is
    the bound of `lmlab.evaluation.rows.ElboRows`."""
    prefixes: bool = False
    """True if its examples may have a `prefix`: models that can't attend so are then refused before a run begins."""
    held_out: type | None = None
    """The class of the objective by which held-out text is scored, made without keys of the config; None is its own,
    with the keys of the config but for `validation_…` and schedules (`lmlab.config.held_out.held_out_objective`)."""
    last_weights: bool = False
    """True if a run ends with its last weights, and not with those that score held-out text best: where the text gets
    harder to score while the model learns, these are early ones."""
    losses: Callable[..., "Scores"] | None = None
    """The method by which the output of a model becomes losses: (model, batch, chunk_size, scale) → Scores, whose nll
    [N] is that of each target. `batch` is a `lmlab.data.datamodule.Batch` in training and a `ScoringBatch` for held-out
    text; the others are arguments of `lmlab.models.loss.score`, which is what None stands for."""
    z_loss: float = 0.0
    """The coefficient of the z-loss of training, see `lmlab.models.loss.score`; not with `losses` of its own."""
    writes: Literal["generate", "fill_mask", "unmask", "infill", "detect"] | None = None
    """The function of `lmlab.models.generation` by which its models write; None is the one that suits their class."""

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        """Returns the example of a text; a pure function of its arguments (promise 1).

        Padding is added after this, so it is never a target.

        Args:
            ids: [T] token ids.
            key: (seed, epoch, sample) of whatever is drawn at random. In evaluation the sample is the number of the
                document, or of the window where windows run across documents.
            first: position of `ids[0]` in the sample, which may be cut into several texts.
        """
        ...

    def sample(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> tuple[str, str]:
        """Returns a prompt made of the ids of a text, and what the model writes when it is given that.

        Args:
            model: in evaluation mode.
        """
        ...


def make_example(
    objective: Objective,
    ids: np.ndarray,
    key: tuple[int, int, int],
    first: int = 0,
    *,
    progress: float = 1.0,
    continues: np.ndarray | None = None,
    number: int = 0,
    documents: np.ndarray | None = None,
) -> Example:
    """Returns the example of a text, for which the objective is given what it has parameters for.

    Of documents that do not see one another, each is a text of its own, unless the objective takes all at once.

    Args:
        ids: as of `Objective.__call__`, and so are `key` and `first`.
        progress: the share of the optimizer steps of the run that were made before, 0 to 1, from which a schedule
            follows. Held-out text is scored as at the end of a run.
        continues: [T] bool: whether each token continues the word of the token before it. None if that is not known;
            for training text it is where the objective has a key `whole_word` that is true.
        number: the number of samples before this one in the whole run, over all ranks; 0 for held-out text. What is to
            be spread evenly over the samples of a batch can be a function of it.
        documents: the number of tokens of each document of the text, where they do not see one another; else None.

    Raises:
        UserError: the objective returns something else, see `check_shapes`.
    """
    given = {"first": first, "progress": progress, "continues": continues, "number": number, "documents": documents}
    parameters = more_parameters(type(objective))
    if documents is not None and "documents" not in parameters:
        parts = []
        for end, length in zip(np.cumsum(documents).tolist(), documents.tolist(), strict=True):
            part = slice(end - length, end)
            own = None if continues is None else continues[part]
            position = first + part.start
            parts.append(
                make_example(objective, ids[part], key, position, progress=progress, continues=own, number=number)
            )
        return join_examples(objective, parts)
    more: dict[str, Any] = {name: given[name] for name in parameters}
    made = objective(ids, key, **more)
    if not isinstance(made, tuple):
        raise UserError(f"{type(objective).__name__} returns a {type(made).__name__}, and an Example was expected.")
    example = Example(*made)
    check_shapes(objective, example, len(ids))
    return example


@cache
def more_parameters(objective: type[Any]) -> tuple[str, ...]:
    """Returns which of the arguments that not every objective has a parameter for the `__call__` of a class takes."""
    parameters = inspect.signature(objective.__call__).parameters
    return tuple(name for name in ("first", "progress", "continues", "number", "documents") if name in parameters)


def join_examples(objective: Objective, parts: Sequence[Example]) -> Example:
    """Returns the examples of documents that do not see one another as one, end to end.

    Raises:
        UserError: an example has what only one text can have.
    """
    if any(part.prefix or part.decoder_inputs is not None for part in parts):
        raise UserError(
            f"preprocess.document_attention=true is not for {type(objective).__name__}, whose examples have "
            f"{'a prefix' if any(part.prefix for part in parts) else 'an encoder and a decoder'}.\nLeave it out."
        )
    lengths = np.array([len(part.inputs) for part in parts])
    starts = np.cumsum(lengths) - lengths

    def joined(field: str, default: Callable[[Example], np.ndarray]) -> np.ndarray | None:
        """Returns one of the fields that have a value for each target; None where no example has it."""
        if all(getattr(part, field) is None for part in parts):
            return None
        return np.concatenate([default(p) if getattr(p, field) is None else getattr(p, field) for p in parts])

    divisors = [len(part.targets) if part.divisor is None else part.divisor for part in parts]
    return Example(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([start + part.positions for start, part in zip(starts, parts, strict=True)]),
        np.concatenate([part.targets for part in parts]),
        weights=joined("weights", lambda part: np.ones(len(part.targets))),
        divisor=None if all(part.divisor is None for part in parts) else sum(divisors),
        draws=joined("draws", lambda part: np.full(len(part.targets), -1.0)),
        documents=lengths,
    )


def check_shapes(objective: Objective, example: Example, length: int) -> None:
    """Refuses an example whose fields are of wrong types or do not fit together.

    Args:
        length: the number of tokens of the text that it is made of.

    Raises:
        UserError: names the field, with what was expected and what was given.
    """
    name, see = type(objective).__name__, "See lmlab.objectives.Example."
    scored = np.size(example.positions)
    # The kinds of numpy's dtypes: signed, unsigned, float. A boolean mask is no array of positions.
    expected = {"inputs": (length, "iu"), "positions": (scored, "iu"), "targets": (scored, "iu")}
    if example.decoder_inputs is not None:  # then the inputs may be of any length, and positions are the decoder's
        length = np.size(example.decoder_inputs)
        expected |= {"inputs": (np.size(example.inputs), "iu"), "decoder_inputs": (length, "iu")}
    if example.tokens is not None:
        expected["tokens"] = (scored, "iu")
    for field in ("weights", "draws"):
        if getattr(example, field) is not None:
            expected[field] = (scored, "iuf")
    for field, (size, kinds) in expected.items():
        given = getattr(example, field)
        if not (isinstance(given, np.ndarray) and given.shape == (size,)):
            kind = "" if isinstance(given, np.ndarray) else f"as {type(given).__name__} "
            raise UserError(
                f"{name} returns {field} {kind}of shape {[*np.shape(given)]}, and an array of {[size]} was expected:\n"
                f"{scored} positions are scored in {length} tokens. {see}"
            )
        if given.dtype.kind not in kinds:
            numbers = "numbers" if "f" in kinds else "whole numbers"
            raise UserError(f"{name} returns {field} of type {given.dtype}, and {numbers} were expected. {see}")
    first, last = (int(example.positions.min()), int(example.positions.max())) if scored else (0, 0)
    if first < 0 or last >= length:
        raise UserError(
            f"{name} returns positions from {first} to {last}, and 0 to {length - 1} was expected, as there are "
            f"{length} tokens. {see}"
        )
    if scored and example.targets.min() < 0:
        raise UserError(
            f"{name} returns the target {example.targets.min()}, which is no token.\n"
            f"Leave out the positions that are not to be scored. {see}"
        )
    if example.weights is not None and not np.isfinite(example.weights).all():
        raise UserError(f"{name} returns weights that are not finite. {see}")
    if example.draws is not None and scored and not (example.draws.min() >= -1 and example.draws.max() < 1):
        raise UserError(f"{name} returns draws that are neither in [0, 1) nor -1. {see}")
    if example.divisor is not None and not (isinstance(example.divisor, int | np.integer) and example.divisor >= 0):
        raise UserError(f"{name} returns the divisor {example.divisor}, and a whole number was expected. {see}")
    if example.documents is not None and int(np.sum(example.documents)) != length:
        raise UserError(
            f"{name} returns documents of {int(np.sum(example.documents))} positions together, and {length} was "
            f"expected. {see}"
        )
    if not 0 <= example.prefix <= length:
        raise UserError(
            f"{name} returns a prefix of {example.prefix}, and 0 to {length} was expected, as there are {length} "
            f"tokens. {see}"
        )
