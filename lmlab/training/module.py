"""The one LightningModule.

Shapes: N scored positions of a batch.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lmlab.data.datamodule import Batch
from lmlab.data.sampler import draws
from lmlab.errors import UserError, nearest
from lmlab.evaluation.metrics import compute_metrics, sum_totals
from lmlab.evaluation.scoring import MeanNLL, Scorer
from lmlab.models.efficiency import share_tied_gradient

NEVER = torch.iinfo(torch.int64).max


class LMModule(Scorer):
    """Trains one model, and scores held-out documents as any evaluation does.

    The loss of an optimizer step is Σ nll / Σ targets over the *global* batch: all ranks,
    all accumulated batches. The number of targets is known only when the last of them is
    through, so the backward passes run on sums over a constant, and the gradients are
    brought to their true scale together with clipping, in one multiplication.
    """

    step_counts: Tensor
    tokens: Tensor
    first_bad_batch: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: Callable[..., tuple[torch.optim.Optimizer, Any]],
        steps: int,
        batch_size: int,
        block_size: int,
        seed: int,
        stretches: int,
        figure: str = "perplexity",
        rows: int | None = None,
        interval: int | None = None,
    ):
        """`steps` and `batch_size` count optimizer steps and their samples, `stretches` those of held-out documents.

        `figure` names the exponential of the loss; `rows` of logits are held at once; every
        `interval` steps there is a validation, and before the first and after the last.
        """
        super().__init__(model, stretches, rows)
        self.optimizer, self.steps, self.interval = optimizer, steps, interval or steps
        self.batch_size, self.seed, self.figure = batch_size, seed, figure
        self.block_size, self.nominal_targets = block_size, batch_size * block_size
        self.train_nll = MeanNLL()
        self.train_auxiliary = MeanNLL()
        """The model's own auxiliary loss, per target as the nll."""
        # Tokens seen in the whole run, by all ranks.
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        self.grad_norm: Tensor | None = None  # of the last step, before clipping
        self.lr = 0.0  # of the last step
        self.validations: dict[int, dict[str, float]] = {}  # the metrics, by step
        self.final: dict[str, float] | None = None
        """The metrics on all held-out documents, where validations look at a part of them."""

    def setup(self, stage: str) -> None:
        """Refuse a callback that monitors what is never logged, before any step is made."""
        logged = ["val/loss", *(f"val/{name}" for name in compute_metrics({}, self.figure) if name != "nll_per_token")]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in logged:
                raise UserError(
                    f'a {type(callback).__name__} monitors "{monitor}", which is not there.'
                    f"{nearest(monitor, logged)} There are: {', '.join(logged)}.",
                    "bad config",
                )

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.optimizer(self.model, self.steps)
        if self.trainer.precision == "16-mixed":
            # Else a fused optimizer would take back the scaling of gradients itself, after they are clipped.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        # transformers hands out pretrained models for use, without dropout; Lightning leaves modes as they are.
        self.train()
        # What a rank counts for itself is no buffer: DDP overwrites those with rank 0's.
        # Targets and tokens of the step under way:
        self.step_counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.first_bad_batch = torch.tensor(NEVER, device=self.device)
        share_tied_gradient(self.model)

    def on_train_start(self) -> None:
        # A kept optimizer brings the rate of its last step, by the schedule of the length that the run had then.
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if isinstance(schedule, LambdaLR):
                groups = schedule.optimizer.param_groups
                for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                    group["lr"] = base * factor(schedule.last_epoch)
        # The validation before the first step, or one that the run was stopped in.
        if self.validation_due():
            loop = self.trainer.fit_loop.epoch_loop  # as Lightning does it between two steps
            self.trainer.validating = True
            loop.val_loop.run()
            self.trainer.training = True
        if self.global_step >= self.steps:
            self.trainer.should_stop = True

    def validation_due(self) -> bool:
        """Whether the weights of this step are to be measured, and are not yet."""
        step = self.global_step
        due = step % self.interval == 0 or step >= self.steps or self.trainer.should_stop
        return due and step not in self.validations

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout is a function of (seed, batch, rank): nothing to carry over a stop.
        state = np.random.SeedSequence([self.seed, batch.number, self.global_rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        nll, auxiliary = self.score(batch)
        total = nll.sum()
        self.train_nll.update(nll)
        if auxiliary is not None:
            # Of the mean over the batch's targets, so that batches weigh by them in the step as well.
            total = total + auxiliary * nll.numel()
            self.train_auxiliary.update(auxiliary.expand(nll.numel()))
        self.step_counts[0] += nll.numel()
        self.step_counts[1] += batch.tokens
        self.batch_number = batch.number
        # Kept on the device: asking for its value here would stall a GPU at every step.
        bad = torch.where(total.isfinite(), NEVER, batch.number)
        self.first_bad_batch.copy_(torch.minimum(self.first_bad_batch, bad))
        # DDP takes the mean over ranks and Lightning over accumulated batches; this is a sum.
        return total * (self.trainer.world_size * self.trainer.accumulate_grad_batches / self.nominal_targets)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scale the gradients to the mean over all targets, clip their norm, keep it for the log."""
        if dist.is_initialized():
            dist.all_reduce(self.step_counts)
        scale = self.nominal_targets / self.step_counts[0].clamp(min=1)
        self.tokens += self.step_counts[1]
        self.step_counts.zero_()
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        norm = torch.nn.utils.get_total_norm(shards)
        if self._device_mesh is not None:
            norm = norm.square()
            dist.all_reduce(norm)
            norm = norm.sqrt()
        self.grad_norm = norm * scale
        if self.trainer.precision != "16-mixed":  # where such a step is left out, and the scale lowered
            bad = torch.where(self.grad_norm.isfinite(), NEVER, self.batch_number)
            self.first_bad_batch.copy_(torch.minimum(self.first_bad_batch, bad))
        if gradient_clip_val:
            scale = scale * (gradient_clip_val / (self.grad_norm + 1e-6)).clamp(max=1.0)
        if shards:
            torch._foreach_mul_(shards, scale.to(shards[0].dtype))
        self.lr = optimizer.param_groups[0]["lr"]

    def stop_on_nonfinite(self) -> None:
        """Stop with the step and the samples of the first batch whose loss or gradient was no number.

        Called by every rank, at the log interval and before weights are judged or kept.
        """
        first = self.first_bad_batch.clone()
        if dist.is_initialized():
            dist.all_reduce(first, dist.ReduceOp.MIN)
        if first == NEVER:
            return
        step = int(first) // self.trainer.accumulate_grad_batches
        size = len(self.trainer.datamodule.train)  # type: ignore[attr-defined]
        samples = [draw.block for draw in draws(self.seed, step * self.batch_size, self.batch_size, size)]
        raise UserError(
            f"the loss or its gradient became not finite at step {step + 1}. "
            f"Blocks of that step's global batch: {samples}.\n"
            "Lower optim.lr, lengthen optim.warmup_steps, set trainer.gradient_clip_val, "
            "or use trainer.precision=32-true.",
            "non-finite loss",
        )

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.stop_on_nonfinite()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        figures = compute_metrics(sum_totals(*self.result), self.figure)
        loss = figures.pop("nll_per_token")
        if loss is None or not math.isfinite(loss):
            raise UserError(
                f"val/loss is {loss} at step {self.global_step}: the weights have diverged (lower optim.lr),\n"
                "or the validation text is too short to hold anything to score (raise preprocess.test_size).",
                "non-finite loss",
            )
        # Without a word or a byte in the text, some figures are none.
        named = {f"val/{name}": value for name, value in figures.items() if value is not None}
        metrics = {"val/loss": loss, **named}
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.final = metrics
            return
        self.validations[self.global_step] = metrics
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        part = {"val/documents": len(data.held_out.documents)} if data.whole is not None else {}
        # For what monitors a figure; loggers get the float64 below, not Lightning's float32 copy.
        self.log_dict(metrics, logger=False, batch_size=1)
        for logger in self.loggers:
            logger.log_metrics({**metrics, **part, "data/tokens_seen": int(self.tokens)}, self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is needed beside weights, optimizer and schedule: all of it follows from the step but these."""
        # Lightning's own place in its loops: another width would count other batches.
        del checkpoint["loops"]
        if "optimizer_states" in checkpoint:
            names = {id(p): name for name, p in self.named_parameters()}
            pairs = zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [by_name(state, optimizer, names) for state, optimizer in pairs]
        checkpoint["validations"] = self.validations
        if hasattr(self, "result"):
            # The records of a validation lie with the weights they are of.
            nll, units = self.result
            checkpoint["validation"] = {"nll": torch.from_numpy(nll), "units": torch.from_numpy(units)}
        # Of the steps since the last report, by rank.
        metrics = (self.train_nll, self.train_auxiliary)
        sums = torch.stack([s for metric in metrics for s in (metric.nll, metric.targets.double())])
        ranks = [torch.empty_like(sums) for _ in range(self.trainer.world_size)]
        if dist.is_initialized():
            dist.all_gather(ranks, sums)
        else:
            ranks = [sums]
        checkpoint["train_nll"] = torch.stack(ranks).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` kept, on any number of ranks."""
        self.validations = checkpoint["validations"]
        if "validation" in checkpoint:
            self.result = checkpoint["validation"]["nll"].numpy(), checkpoint["validation"]["units"].numpy()
        # At the same width, each rank gets back its own.
        sums = checkpoint["train_nll"][self.global_rank :: self.trainer.world_size].sum(0).to(self.device)
        for metric, (total, targets) in zip((self.train_nll, self.train_auxiliary), sums.view(-1, 2), strict=False):
            metric.nll, metric.targets = total, targets.long()
            metric._update_count = 1  # else it warns of being read before it was written
        steps = checkpoint["global_step"]
        loop = self.trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = steps
        for count in ("ready", "started", "processed", "completed"):
            setattr(loop.batch_progress.total, count, steps * self.trainer.accumulate_grad_batches)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # Lightning validates when training is about to stop; without this the last steps
        # of a run whose length is no multiple of the interval would go unmeasured.
        if self.global_step >= self.steps:
            self.trainer.should_stop = True


def by_name(state: dict[str, Any], optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """An optimizer's state dict with its parameters by their names in the place of numbers.

    A plain optimizer numbers its parameters group by group, and one whose parameters are sharded in the
    order of the model: by name, either can load what the other saved.

    Args:
        names: of the model's parameters, by their `id`.
    """
    if not state:  # of a rank from which a sharded one was gathered
        return state
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    named = {number: names[id(parameter)] for number, parameter in zip(numbers, params, strict=True)}
    return {
        "state": {named[number]: tensors for number, tensors in state["state"].items()},
        "param_groups": [
            group | {"params": [named[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
