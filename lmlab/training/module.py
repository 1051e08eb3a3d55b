"""The LightningModule that every run trains.

Shapes: B rows of a batch, T positions, N scored positions of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lmlab.data.datamodule import Batch
from lmlab.data.sampler import draws
from lmlab.errors import UserError
from lmlab.evaluation.scoring import DocumentSums, MeanNLL
from lmlab.models.efficiency import share_tied_gradient
from lmlab.models.loss import Scores
from lmlab.models.teacher import Teacher
from lmlab.training.validation import ValidatedModule

NEVER = torch.iinfo(torch.int64).max
"""The number of the first batch with a loss that is not finite, as long as there was none."""


class LMModule(ValidatedModule):
    """Trains one model, and validates it.

    The loss of an optimizer step is Σ nll / Σ targets over the *global* batch: all ranks and all accumulated
    batches. An objective may weigh the nll, and divide by another number: see `Example`. What is divided by is known
    only after the last of the batches, so `training_step` divides by a constant, and `configure_gradient_clipping`
    finds the factor that brings the gradients to their true scale and clips them.
    """

    step_counts: Tensor
    """[2] int64: the sums of `Batch.divisor` and of tokens of this rank in the step under way."""
    first_bad_batch: Tensor
    """int64 scalar: the number of this rank's first batch whose loss or gradient was not finite, or `NEVER`."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: Callable[..., tuple[torch.optim.Optimizer, Any]],
        *,
        steps: int,
        batch_size: int,
        block_size: int,
        seed: int,
        sums: DocumentSums,
        metric: str = "perplexity",
        logits_chunk_size: int | None = None,
        val_interval: int | None = None,
        reduces_once: bool = True,
        teacher: Teacher | None = None,
        losses: Callable[..., Scores] | None = None,
        held_out_losses: Callable[..., Scores] | None = None,
        domains: Sequence[str] = (),
        z_loss: float = 0.0,
    ):
        """Takes a model, and how it is trained.

        Args:
            optimizer: called with the model and `steps`; returns an optimizer and a schedule that is stepped with it.
            steps: optimizer steps of the whole run.
            batch_size: samples of an optimizer step, over all ranks and accumulated batches.
            block_size: tokens of a sample, at most.
            seed: decides the dropout of each batch on each rank.
            sums: the metric that adds up the nll of held-out rows: see `HeldOut.sums`.
            metric: the name of exp(mean nll), such as `masked_perplexity`.
            logits_chunk_size: the number of scored positions whose logits are in memory at once; None for all.
            val_interval: optimizer steps between validations; None validates before the first and after the last only.
            reduces_once: True to sum the gradients of a sharded model over the ranks once a step, for which each rank
                keeps one of the whole model between accumulated batches; False to sum them after each batch.
            teacher: a model whose probabilities are learned too. Held-out text is scored without it.
            losses: how a training batch is scored: see `Objective.losses`.
            held_out_losses: how held-out rows are scored: see `HeldOut.losses`.
            domains: the names of the parts of the held-out text that are validated on their own too.
            z_loss: the coefficient of the z-loss of training, see `lmlab.models.loss.score`.
        """
        validated: dict[str, Any] = {"steps": steps, "val_interval": val_interval, "metric": metric, "domains": domains}
        super().__init__(model, sums, logits_chunk_size, held_out_losses, **validated)
        self.optimizer, self.block_size, self.seed = optimizer, block_size, seed
        self.reduces_once, self.teacher, self.losses = reduces_once, teacher, losses
        self.z_loss, self.nominal_targets = z_loss, batch_size * block_size
        self.train_nll = MeanNLL()
        self.train_auxiliary = MeanNLL()
        """The auxiliary loss, per target as the nll."""
        self.train_kl = MeanNLL()
        """The KL divergence of the teacher from the model, per target."""
        self.train_z_loss = MeanNLL()
        """The z-loss, per target."""
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        self.grad_norm: Tensor | None = None
        """Norm of the gradient of the last step, before clipping."""
        self.lr = 0.0
        """Learning rate of the last step."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, scheduler = self.optimizer(self.model, self.steps)
        if self._device_mesh is not None:
            # A fused optimizer takes no `grad_scale` for sharded parameters.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of the loss; None unless in 16-mixed."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_fit_start(self) -> None:
        # transformers returns pretrained models in evaluation mode, without dropout, and Lightning keeps modes.
        self.train()
        # Not buffers: DDP would overwrite what each rank counts for itself with the values of rank 0.
        self.step_counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.first_bad_batch = torch.tensor(NEVER, device=self.device)
        share_tied_gradient(self.model)
        if self.teacher is not None:  # Lightning does not know of it
            self.teacher.model.to(self.device, next(self.model.parameters()).dtype)

    def on_train_end(self) -> None:
        self.use_evaluated_weights()  # which are exported

    def on_train_start(self) -> None:
        # A loaded optimizer has the rate that its last step had by the schedule of the run's length at that time.
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if isinstance(schedule, LambdaLR):
                groups = schedule.optimizer.param_groups
                for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                    group["lr"] = base * factor(schedule.last_epoch)
        # The validation before the first step, or one that the run was stopped in.
        if self.validation_due():
            self.trainer.validating = True  # as Lightning does it between two steps
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True
        if self.global_step >= self.steps:
            self.trainer.should_stop = True

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout is a function of (seed, batch, rank), so that resuming needs no generator state (promise 1).
        state = np.random.SeedSequence([self.seed, batch.number, self.global_rank]).generate_state(1, np.uint64)
        seed = int(state[0])
        # Not by torch.manual_seed: for each kind of device that is not there it formats the stack of its caller, in
        # each batch.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self._device_mesh is not None and self.reduces_once:
            last = (batch.number + 1) % self.trainer.accumulate_grad_batches == 0
            self.model.set_requires_gradient_sync(last)
        # DDP takes the mean over ranks and Lightning over accumulated batches; this makes them sums.
        factor = self.trainer.world_size * self.trainer.accumulate_grad_batches / self.nominal_targets
        scale = None if self.scaler is None else self.scaler.scale(torch.full((), factor, device=self.device))
        nll, auxiliary, own_loss, kl = self.score(batch, self.losses, scale, self.teacher, z_loss=self.z_loss)
        loss = (nll if own_loss is None else own_loss).sum()
        self.train_nll.update(nll, batch.divisor)
        if kl is not None:
            self.train_kl.update(kl, batch.divisor)
        if self.z_loss and own_loss is not None:
            self.train_z_loss.update(own_loss.detach() - nll, batch.divisor)
        if auxiliary is not None:
            # Weighted by the number of targets, as the nll of the batch is.
            loss = loss + auxiliary * batch.divisor
            self.train_auxiliary.update(auxiliary.double() * batch.divisor, batch.divisor)
        # Not by +=, which would copy each sum onto itself.
        self.step_counts[0].add_(batch.divisor)
        self.step_counts[1].add_(batch.tokens)
        self.batch_number = batch.number
        self.note_nonfinite(loss)
        return loss * factor

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scales the gradients to those of the mean over all targets of the global batch, and clips their norm.

        A fused optimizer is left to do it, in its own pass over the gradients, which it divides by its `grad_scale`.
        With a scaler the gradients are still scaled here, and `torch.amp.GradScaler.step` multiplies `grad_scale` by
        its own scale.
        """
        if dist.is_initialized():
            dist.all_reduce(self.step_counts)
        scale = self.nominal_targets / self.step_counts[0].clamp(min=1)
        self.tokens += self.step_counts[1]
        self.step_counts.zero_()
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        norm = torch.nn.utils.get_total_norm(shards)
        if fused and self.scaler is not None:
            norm = norm / self.scaler.scale(torch.ones_like(norm))
        if self._device_mesh is not None:
            norm = norm.square()
            dist.all_reduce(norm, group=self._device_mesh.get_group("shards"))
            norm = norm.sqrt()
        self.grad_norm = norm * scale
        if self.scaler is None:  # a scaler skips such a step, and lowers its scale
            self.note_nonfinite(self.grad_norm)
        if gradient_clip_val:
            scale = scale * (gradient_clip_val / (self.grad_norm + 1e-6)).clamp(max=1.0)
        if fused:
            optimizer.grad_scale = scale.reciprocal()  # type: ignore[attr-defined]
        elif shards:
            torch._foreach_mul_(shards, scale.to(shards[0].dtype))
        self.lr = optimizer.param_groups[0]["lr"]

    def note_nonfinite(self, value: Tensor) -> None:
        """Notes the current batch as bad if its loss or gradient norm is not finite.

        The note stays on the device: reading it here would make a GPU wait at every step.
        """
        bad = torch.where(value.isfinite(), NEVER, self.batch_number)
        torch.minimum(self.first_bad_batch, bad, out=self.first_bad_batch)

    def check_finite(self) -> None:
        """Ends the run if the loss or the gradient of any batch was not finite.

        All ranks have to call it, before weights are validated or saved.

        Raises:
            UserError: as by `refuse_bad_batch`.
        """
        first = self.first_bad_batch.clone()
        if dist.is_initialized():
            dist.all_reduce(first, dist.ReduceOp.MIN)
        self.refuse_bad_batch(int(first))

    def refuse_bad_batch(self, first: int) -> None:
        """Ends the run if the loss or the gradient of a batch of any rank was not finite.

        Args:
            first: the least `first_bad_batch` of all ranks; `NEVER` if there is none.

        Raises:
            UserError: names the step and the blocks of its global batch.
        """
        if first >= NEVER:
            return
        step = first // self.trainer.accumulate_grad_batches
        order = self.trainer.datamodule.order  # type: ignore[attr-defined]
        sizes = self.trainer.datamodule.sizes  # type: ignore[attr-defined]
        blocks = [draw.block for draw in draws(self.seed, sizes.before(step), sizes.of(step), order)]
        raise UserError(
            f"the loss or its gradient is not finite at step {step + 1}. "
            f"Blocks of that step's global batch: {blocks}.\n"
            "Lower optim.lr, lengthen optim.warmup_steps, set trainer.gradient_clip_val, "
            "or use trainer.precision=32-true.",
            "non-finite loss",
        )

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # Lightning validates before it stops; without this the last steps of a run whose length is no multiple of
        # the interval would not be validated.
        if self.global_step >= self.steps:
            self.trainer.should_stop = True

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.check_finite()
        super().on_validation_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what does not follow from the step: validations, and the sums since the last report."""
        # Lightning's own position in its loops counts batches, of which another world size makes others.
        del checkpoint["loops"]
        if "optimizer_states" in checkpoint:
            names = {id(p): name for name, p in self.named_parameters()}
            pairs = zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [name_parameters(state, optimizer, names) for state, optimizer in pairs]
        checkpoint["validations"] = self.validations
        checkpoint["average"] = None if self.average is None else self.average.facts()
        if hasattr(self, "result"):
            # The sums of the last validation lie with the weights they are of, for their certificate.
            nll, counts = self.result
            checkpoint["validation"] = {"nll": torch.from_numpy(nll), "units": torch.from_numpy(counts)}
        checkpoint["train_nll"] = self.by_rank(self.sums_since_report()).cpu()

    def sums_since_report(self) -> Tensor:
        """Returns the sums of this rank since the last report [8]: of each of `train_metrics`, and its targets."""
        return torch.stack([s for metric in self.train_metrics for s in (metric.nll, metric.targets.double())])

    @property
    def train_metrics(self) -> tuple[MeanNLL, ...]:
        """The means over the training targets since the last report."""
        return self.train_nll, self.train_auxiliary, self.train_kl, self.train_z_loss

    def by_rank(self, values: Tensor) -> Tensor:
        """Returns the values [n] of all ranks, [world size, n]; each of them has to call it."""
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)
        return gathered.view(-1, len(values))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` saved, on any number of ranks."""
        self.validations = checkpoint["validations"]
        if "validation" in checkpoint:
            self.result = checkpoint["validation"]["nll"].numpy(), checkpoint["validation"]["units"].numpy()
        # At the same world size, each rank gets its own sums again.
        sums = checkpoint["train_nll"][self.global_rank :: self.trainer.world_size].sum(0).to(self.device)
        # Earlier versions saved fewer.
        for metric, (nll, targets) in zip(self.train_metrics, sums.view(-1, 2), strict=False):
            metric.nll, metric.targets = nll, targets.long()
            metric._update_count = 1  # else torchmetrics warns that it was computed before any update
        steps = checkpoint["global_step"]
        loop = self.trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = steps
        for count in ("ready", "started", "processed", "completed"):
            setattr(loop.batch_progress.total, count, steps * self.trainer.accumulate_grad_batches)


def name_parameters(state: dict[str, Any], optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Returns the state dict of an optimizer with parameters identified by their names instead of numbers.

    A plain optimizer numbers its parameters group by group, and one of sharded parameters in the order of the model.
    By name, either can load what the other saved.

    Args:
        state: what `optimizer.state_dict()` returns; empty on ranks from which a sharded one was gathered.
        optimizer: has the parameters in the same groups.
        names: the names of the model's parameters by their `id`.
    """
    if not state:
        return state
    named = {
        number: names[id(parameter)]
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
        for number, parameter in zip(saved["params"], group["params"], strict=True)
    }
    return {
        "state": {named[number]: tensors for number, tensors in state["state"].items()},
        "param_groups": [
            group | {"params": [named[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
