"""Validations of a run: when they are due, which weights they score, and the metrics that they log."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel

from lmlab.data.documents import Documents
from lmlab.errors import UserError, nearest
from lmlab.evaluation.metrics import compute_metrics, sum_totals
from lmlab.evaluation.scoring import DocumentSums, Scorer, ScoringBatch
from lmlab.models.loss import Scores

if TYPE_CHECKING:
    from lmlab.training.averages import Average


class ValidatedModule(Scorer):
    """Scores the held-out documents while its model is trained, exactly as an evaluation does."""

    tokens: Tensor
    """int64 scalar: tokens seen in the whole run, by all ranks."""

    def __init__(
        self,
        model: PreTrainedModel,
        sums: DocumentSums,
        chunk_size: int | None,
        held_out_losses: Callable[..., Scores] | None,
        *,
        steps: int,
        val_interval: int | None,
        metric: str,
        domains: Sequence[str],
    ):
        """Takes a model, and how it is validated; the first arguments are those of `Scorer`.

        Args:
            steps: optimizer steps of the whole run.
            val_interval: optimizer steps between validations; None validates before the first and after the last only.
            metric: the name of exp(mean nll), such as `masked_perplexity`.
            domains: the names of the parts of the held-out text that are validated on their own too.
        """
        super().__init__(model, sums, chunk_size, held_out_losses)
        self.steps, self.val_interval = steps, val_interval or steps
        self.metric, self.domains = metric, domains
        self.validations: dict[int, dict[str, float]] = {}
        """The metrics of each validation, by its step."""
        self.suite_metrics: dict[str, float] = {}
        """The metrics that a callback has measured in the validation under way, which are logged with its own."""
        self.final: dict[str, float] | None = None
        """The metrics on all held-out documents, where validations look at a part of them."""
        self.averages: Sequence[Average] = ()
        """Averages of the weights that validations score too; a callback sets them."""
        self.average: Average | None = None
        """The one of them that is in place of the weights."""
        self.kept_aside: list[Tensor] | None = None
        """The weights that are trained, while those that are evaluated are in their place."""

    @property
    def metric_names(self) -> list[str]:
        """The names of the metrics of the held-out text and of its domains, as validations log them."""
        names = ["loss", *(name for name in compute_metrics({}, self.metric) if name != "nll_per_token")]
        prefixes = ["", *(f"{domain}/" for domain in self.domains)]
        return [f"val/{prefix}{name}" for prefix in prefixes for name in names]

    def setup(self, stage: str) -> None:
        """Refuses a callback that monitors a metric that is never logged, before any step is made."""
        logged = self.metric_names
        logged += [name for each in self.trainer.callbacks for name in getattr(each, "metrics", ())]  # type: ignore[attr-defined]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in logged:
                raise UserError(
                    f'a {type(callback).__name__} monitors "{monitor}", which is not there.'
                    f"{nearest(monitor, logged)} There are: {', '.join(logged)}.",
                    "bad config",
                )

    def use_evaluated_weights(self) -> None:
        """Puts the weights in place that are evaluated, where an optimizer has others than those that it trains.

        Such an optimizer is schedule-free; it exchanges them by its methods `eval` and `train`.
        """
        optimizer: Any = self.trainer.optimizers[0]
        if hasattr(optimizer, "eval") and self.kept_aside is None:
            self.kept_aside = [parameter.detach().clone() for parameter in self.model.parameters()]
            optimizer.eval()

    def use_trained_weights(self) -> None:
        """Puts the weights that are trained back in their place, bit for bit."""
        if self.kept_aside is not None:
            optimizer: Any = self.trainer.optimizers[0]
            optimizer.train()
            with torch.no_grad():
                torch._foreach_copy_([*self.model.parameters()], self.kept_aside)
            self.kept_aside = None

    def validation_due(self) -> bool:
        """Returns whether the weights of this step are to be validated and have not been yet."""
        step = self.global_step
        due = step % self.val_interval == 0 or step >= self.steps or self.trainer.should_stop
        return due and step not in self.validations

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.use_evaluated_weights()

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.use_trained_weights()

    def validation_step(self, batch: ScoringBatch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.trainer.state.fn == TrainerFn.FITTING:
            for average in self.averages:
                with average.in_place():
                    average.sums.update(self.score(batch, self.held_out_losses).nll, batch)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        final = self.trainer.state.fn == TrainerFn.VALIDATING
        documents = data.held_out.documents
        metrics = self.validation_metrics(self.result, documents)
        loss = metrics.get("val/loss")
        if loss is None or not math.isfinite(loss):
            raise UserError(
                f"val/loss is {loss} at step {self.global_step}: the weights have diverged (lower optim.lr),\n"
                "or the validation text is too short to hold anything to score (raise preprocess.test_size).",
                "non-finite loss",
            )
        metrics |= self.suite_metrics
        if final:
            self.final = metrics
            return
        for average in self.averages:
            average.result = tuple(sums.cpu().numpy() for sums in average.sums.compute())
            average.sums.reset()
            of_weights = self.validation_metrics(average.result, documents)
            metrics |= {of_average(name, average.name): value for name, value in of_weights.items()}
        self.validations[self.global_step] = metrics
        # For callbacks that monitor a metric; the loggers get float64 below, not Lightning's float32 copy.
        self.log_dict(metrics, logger=False, batch_size=1)
        counts = {"val/documents": len(data.held_out.documents)} if data.whole is not None else {}
        for logger in self.loggers:
            logger.log_metrics({**metrics, **counts, "data/tokens_seen": int(self.tokens)}, self.global_step)

    def validation_metrics(self, result: tuple[np.ndarray, np.ndarray], documents: Documents) -> dict[str, float]:
        """Returns the metrics of a validation over all documents and those of each domain, by their names in full.

        Args:
            result: what was summed up, as of `Scorer.result`.
        """
        nll, counts = result
        parts = {"val": slice(None)} | {f"val/{domain}": documents.stretches_of(domain) for domain in self.domains}
        metrics: dict[str, float] = {}
        for prefix, stretches in parts.items():
            values = compute_metrics(sum_totals(nll[stretches], counts[stretches]), self.metric)
            # Those per word and per byte are None for a text without any.
            logged = {name: v for name, v in values.items() if v is not None and not name.endswith("_standard_error")}
            metrics |= {f"{prefix}/{name.replace('nll_per_token', 'loss')}": value for name, value in logged.items()}
        return metrics

    def candidates(self, monitor: str) -> dict[str, float]:
        """Returns a monitored metric of the last validation: of each average by its name, and of the weights by ""."""
        metrics = self.validations[self.global_step]
        for average in self.averages:
            if monitor.rpartition("/")[2].startswith(f"{average.name}_"):  # it is the average's own
                return {average.name: metrics[monitor]}
        of_averages = {average.name: metrics.get(of_average(monitor, average.name)) for average in self.averages}
        return {"": metrics[monitor]} | {name: value for name, value in of_averages.items() if value is not None}

    @contextmanager
    def with_average(self, name: str) -> Iterator[None]:
        """Puts an average and the sums of its validation in place of the weights and theirs; "" changes nothing."""
        self.average = next((average for average in self.averages if average.name == name), None)
        if self.average is None:
            yield
            return
        own, self.result = self.result, self.average.result
        with self.average.in_place():
            yield
        self.result, self.average = own, None


def of_average(metric: str, name: str) -> str:
    """Returns the name of a metric of an average: `val/ema_loss` of `val/loss`."""
    folder, _, last = metric.rpartition("/")
    return f"{folder}/{name}_{last}"
