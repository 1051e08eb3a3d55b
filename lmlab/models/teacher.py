"""The teacher of a student: a trained model whose probabilities the student learns beside its targets.

Shapes: B rows, T positions, H hidden size of the teacher, N scored positions of the batch, R of them, V vocabulary of
the student, V' that of the teacher after padding, K tokens of the tokenizer.
"""

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.errors import UserError
from lmlab.hub import from_hub, split_revision
from lmlab.models.checks import check_model
from lmlab.models.chunked_loss import compiled_nll_and_slope, nll_and_slope, pad_vocabulary, product_dtype
from lmlab.models.efficiency import fuse_activations
from lmlab.models.formats import load_config, load_model, load_tokenizer
from lmlab.models.loading import auto_class_of, auto_model, task
from lmlab.models.loss import run_on_scored
from lmlab.models.memory import check_weights
from lmlab.models.probe import probe
from lmlab.models.torch_module import TorchModuleConfig
from lmlab.objectives import Objective


class TeacherOutput(NamedTuple):
    """The logits of a teacher at the scored positions of a batch, and the losses by which a student learns them."""

    logits: Callable[[slice], Tensor]
    """Returns the teacher's logits [R, K] of some of the positions."""
    teacher: "Teacher"

    def losses(self, logits: Tensor, nll: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loss, nll and kl [N] (see `lmlab.models.loss.Scores`), for autograd to differentiate.

        Args:
            logits: [N, V] the student's.
            nll: [N] the student's.
        """
        theirs = self.logits(slice(None)).float() / self.teacher.temperature  # [N, K]
        ours = logits[:, : theirs.shape[1]].float() / self.teacher.temperature
        kl = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True).sum(1)
        return self.teacher.loss(nll, kl), nll, kl

    def distill(
        self, part: slice, logits: Tensor, targets: Tensor, dtype: torch.dtype | None, factors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns loss, nll and kl [R] of some positions, and the gradient of the loss with respect to the logits.

        The arguments after `part` are those of `lmlab.models.chunked_loss.nll_and_slope`.
        """
        function = compiled_distillation(logits.device.type) if logits.is_cuda else distillation_and_slope
        weight, temperature = self.teacher.weight, self.teacher.temperature
        nll, kl, slope = function(logits, targets, dtype, factors, self.logits(part), weight, temperature)
        return self.teacher.loss(nll, kl), nll, kl, slope


def distillation_and_slope(
    logits: Tensor,
    targets: Tensor,
    dtype: torch.dtype | None,
    factors: Tensor | None,
    teacher_logits: Tensor,
    weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns nll and kl [R] of targets, and the gradient of `Teacher.loss` with respect to the logits, in a dtype.

    That of temperature² · kl is temperature · (softmax(student / temperature) - softmax(teacher / temperature)).

    Args:
        logits, targets, dtype, factors: as of `nll_and_slope`; the logits are those of the student.
        teacher_logits: [R, K].
        weight, temperature: as of `Teacher`.
    """
    theirs = (teacher_logits.float() / temperature).log_softmax(1)
    ours = (logits[:, : teacher_logits.shape[1]].float() / temperature).log_softmax(1)
    probabilities = theirs.exp()
    kl = (theirs - ours).mul_(probabilities).sum(1)
    nll, slope = nll_and_slope(logits, targets, None if dtype is None else torch.float32)
    if slope is None or dtype is None:
        return nll, kl, None
    soft = ours.exp_().sub_(probabilities).mul_(temperature)
    slope.mul_(1 - weight)[:, : soft.shape[1]].add_(soft, alpha=weight)
    if factors is not None:
        slope.mul_(factors)
    return nll, kl, slope.to(dtype)


@cache
def compiled_distillation(device: str) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """Returns `distillation_and_slope` compiled for a kind of device; as it is where `nll_and_slope` can't be."""
    if compiled_nll_and_slope(device) is nll_and_slope:
        return distillation_and_slope
    return torch.compile(distillation_and_slope, dynamic=True)


class Teacher:
    """A trained model whose probabilities a student learns: knowledge distillation (Hinton et al. 2015, section 2).

    At each scored position the loss of the student is (for language models see Sanh et al. 2019)

    ```
    (1 - weight) · nll + weight · temperature² · KL(teacher ‖ student)
    ```

    where both distributions are softmax(logits / temperature) over the tokens of the tokenizer.

    It is no module of torch: as an attribute of one it is no part of its parameters, state dict and checkpoints.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, weight: float = 0.5, temperature: float = 1.0):
        """Takes a trained model, which is not to be trained any further.

        Args:
            tokens: K. Rows of padding, which either model may have behind them, are left out.
        """
        self.model = model.eval().requires_grad_(False)
        self.tokens, self.weight, self.temperature = tokens, weight, temperature

    def loss(self, nll: Any, kl: Any) -> Any:
        """Returns the loss of a student, of numbers or tensors: its nll, and its kl at this temperature."""
        return (1 - self.weight) * nll + self.weight * self.temperature**2 * kl

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        prefix: Tensor | None = None,
        decoder_ids: Tensor | None = None,
        document_positions: Tensor | None = None,
    ) -> TeacherOutput:
        """Runs the teacher on a batch; the arguments are those of `lmlab.models.loss.score`.

        Where its logits are a plain projection, they are made of as few positions at a time as they are asked for.
        """
        projects = probe(self.model).projects
        shown = input_ids, attention_mask, positions, prefix, decoder_ids, document_positions
        _, rows = run_on_scored(self.model, *shown, project=not projects)
        if not projects:
            return TeacherOutput(lambda part: rows[part, : self.tokens], self)
        head, dtype = self.model.get_output_embeddings(), product_dtype(rows, unscaled=False)
        inputs, matrix = rows.to(dtype), pad_vocabulary(head.weight, dtype)  # [N, H], [V', H]
        bias = None if head.bias is None else pad_vocabulary(head.bias, dtype)

        def logits(part: slice) -> Tensor:
            with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
                return F.linear(inputs[part], matrix, bias)[:, : self.tokens]

        return TeacherOutput(logits, self)


def load_teacher(
    model: str,
    weight: Annotated[float, Ge(0), Le(1)] = 0.5,
    temperature: Annotated[float, Gt(0)] = 1.0,
    *,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    block_size: int,
    document_attention: bool = False,
) -> Teacher:
    """Loads a teacher, in float32.

    Args:
        model: run directory, exported directory, `.gguf` file, or hub id of the teacher.
        weight: the share of the teacher in the loss; the targets have the rest.
        temperature: divides the logits of both models; above 1 the teacher's less likely tokens count for more.
        tokenizer: that of the student.
        objective: that of the student.
        block_size: tokens of a block.
        document_attention: whether the documents of a block do not see one another.

    Raises:
        UserError: it can't be loaded, or can't teach this student; says why.
    """
    repository, revision = split_revision(model)
    with from_hub("teacher", repository, "distill.model"):
        settings = load_config(repository, revision)
        kind = auto_class_of(settings, model)
        if kind != objective.auto_class:
            raise UserError(
                f"distill.model={model} is a {task(kind)} model, and the objective trains a "
                f"{task(objective.auto_class)} one.\nChoose a teacher that was trained by the same objective."
            )
        theirs = load_tokenizer(repository, revision)
        if theirs.get_vocab() != tokenizer.get_vocab():
            own = tokenizer.name_or_path or "learned from the run's text"
            raise UserError(
                f"distill.model={model} has another tokenizer ({len(theirs)} tokens) than the student ({own}, "
                f"{len(tokenizer)} tokens).\nTake the teacher's: tokenizer=pretrained tokenizer.name={model}"
            )
        if isinstance(settings, TorchModuleConfig):
            raise UserError(
                f"distill.model={model} holds a torch module, which can be a student, but no teacher.\n"
                "Choose a teacher of an architecture of transformers."
            )
        auto = auto_model(settings, kind)
        check_weights(auto, settings)
        loaded, missing = load_model(auto, repository, revision, settings, dtype=torch.float32)
    if missing:
        raise UserError(f"distill.model={model} holds no weights for {', '.join(missing)}.")
    try:
        check_model(loaded, tokenizer, block_size, objective, document_attention)
    except UserError as error:
        raise UserError(f"distill.model={model}: {error}") from error
    fuse_activations(loaded)
    return Teacher(loaded, len(tokenizer), weight, temperature)
