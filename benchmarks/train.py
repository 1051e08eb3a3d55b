"""Training steps of lmlab and of a peer, pair by pair: the same weights, batches, threads and precision.

  python -m benchmarks.train objective=mlm size=distil                     over the Hugging Face Trainer
  python -m benchmarks.train size=small peer=loop                          over a plain PyTorch loop
  python -m benchmarks.train size=small peer=compiled lmlab.compile=true   both compiled
  python -m benchmarks.train size=tiny peer=lightning                      over Lightning's own loop
  python -m benchmarks.train size=small peer=lmlab lmlab.compile=true      over lmlab without the lmlab.… keys
  python -m benchmarks.train size=distil block_size=1024 measure=memory    peak memory of one step
  python -m benchmarks.train peer=lmlab agree=1 lmlab.adapter=lora         LoRA over training all weights
  python -m benchmarks.train size=medium peer=lmlab batch_size=96 agree=1 lmlab.optim=muon   Muon over AdamW

Keys, with their defaults:

  objective=clm         clm, mlm
  size=distil           tiny, small (4 × 128), medium (4 × 256), distil (6 × 768), gpt2 (12 × 768): layers × width
  peer=trainer          trainer, loop, compiled (the loop under torch.compile), lightning (a module of a few lines),
                        lmlab (without the lmlab.… keys)
  precision=32-true     32-true, bf16-mixed
  batch_size=8          blocks of a step
  block_size=0          positions of a block; 0: 16, 64, 128 or 1024, by size
  vocabulary=0          tokens; 0: 200, 4096 or the trained model's, by size
  dropout=on            on, off: whether timed steps have the model's own dropout
  pairs=3               turns of each side
  turn=3.0              seconds of the faster side's turn, at least: it makes one step or more
  agree=2               steps without dropout at the start, whose losses must agree
  warmup=1              steps after them that are not timed; as many again where they are short
  measure=speed         speed, memory (one step each, one side after the other)
  lmlab.KEY=VALUE       any override of `python -m lmlab.train`, for lmlab's side alone

With a GPU in the machine it runs there.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.arguments import Arguments
from benchmarks.pairs import Side, agreement, outcome, spread, take_turns, workplace
from benchmarks.results import verb
from benchmarks.side import Turns
from benchmarks.utilization import peaks, speed
from lmlab.errors import UserError

SIZES = {  # layers, width, heads, positions of a block; vocabulary of a causal and of a masked model
    "tiny": (1, 32, 2, 16, 200, 200),
    "small": (4, 128, 4, 64, 4096, 4096),
    "medium": (4, 256, 4, 128, 4096, 4096),
    "distil": (6, 768, 12, 128, 50257, 50265),
    "gpt2": (12, 768, 12, 1024, 50257, 50265),
}
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
"""The special tokens, with the ids 0 to 3: RoBERTa wants a low id to pad with."""
SEED, STEPS, LR, WARMUP_STEPS, WEIGHT_DECAY = 0, 100_000, 1e-3, 20, 0.01
# What lmlab's side may not be told otherwise: speeds are of so many tokens a step.
WORK = ("batch_size", "preprocess", "data", "objective", "model", "trainer.accumulate", "trainer.devices", "seed")
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 2e-2}


class Sized:
    """Settings of a benchmark that has a model of one of `SIZES`."""

    objective: str = "clm"
    size: str
    block_size: int

    @property
    def causal(self) -> bool:
        return self.objective == "clm"

    @property
    def positions(self) -> int:
        return self.block_size or SIZES[self.size][3]


@dataclass
class Settings(Sized, Arguments):
    objective: Literal["clm", "mlm"] = "clm"
    size: Literal["tiny", "small", "medium", "distil", "gpt2"] = "distil"
    peer: Literal["trainer", "loop", "compiled", "lightning", "lmlab"] = "trainer"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    batch_size: int = 8
    block_size: int = 0
    vocabulary: int = 0
    dropout: Literal["on", "off"] = "on"
    pairs: int = 3
    turn: float = 3.0
    agree: int = 2
    warmup: int = 1
    measure: Literal["speed", "memory"] = "speed"
    lmlab: tuple[str, ...] = ()


def compare(settings: Settings) -> dict[str, Any]:
    for word in settings.lmlab:
        if word.lstrip("+~").startswith(WORK):
            raise UserError(f"lmlab.{word} changes what a step does, and speeds would not compare. Leave it out.")
    plain = replace(settings, lmlab=())
    peer = "plain" if settings.peer == "lmlab" else settings.peer
    with workplace() as folder:
        make(folder, settings.size, settings.causal, settings.positions, settings.vocabulary)
        ours, theirs = Side("train", "lmlab", settings, folder), Side("train", peer, plain, folder)
        if settings.measure == "memory":
            return compare_memory(settings, (ours, theirs))
        flops, peak = flops_of_step(settings, folder), peaks(settings.precision)
        with ours, theirs:
            agreed = [side.turn(steps=settings.agree, dropout=False) for side in (ours, theirs)]
            steps = long_enough((ours, theirs), settings)
            tokens = settings.batch_size * settings.positions
            work, dropout = (steps * tokens, steps * tokens), settings.dropout == "on"
            pairs = take_turns((ours, theirs), settings.pairs, work, steps=steps, dropout=dropout)
            memory = {side.name: side.end() for side in (ours, theirs)}
    losses = {side.name: turn["losses"] for side, turn in zip((ours, theirs), agreed, strict=True)}
    found = outcome(pairs, agreement(losses, TOLERANCE[settings.precision]), memory)
    speeds = {name: speed(rate, tokens, flops, peak, memory[name]) for name, rate in found["sides"].items()}
    return found | {"steps_per_turn": steps, "flops_per_step": flops, "peak": peak, "speed": speeds} | ours.facts


def long_enough(sides: tuple[Side, Side], settings: Settings) -> int:
    """Warms up, and returns how many steps last a turn."""
    for _ in range(2):  # the first ones are slower, and only where a step is short does it matter
        order = {"steps": settings.warmup, "dropout": settings.dropout == "on"}
        warm = [side.turn(**order)["seconds"] for side in sides]
        if min(warm) > settings.turn:
            break
    return math.ceil(settings.turn * settings.warmup / min(warm))


def compare_memory(settings: Settings, sides: tuple[Side, Side]) -> dict[str, Any]:
    """Runs each side alone, so that both fit: a step without dropout, whose losses have to agree, one with it."""
    losses, memory = {}, {}
    for side in sides:
        with side:
            losses[side.name] = side.turn(steps=1, dropout=False)["losses"]
            side.turn(steps=1, dropout=settings.dropout == "on")
            memory[side.name] = side.end()
    peaks = {name: facts["peak"] / 2**20 for name, facts in memory.items()}
    ours, theirs = peaks.values()
    agreed = agreement(losses, TOLERANCE[settings.precision])
    ratio = None if agreed["void"] else spread([ours / theirs])
    return {"unit": "MiB", "sides": peaks, "result": ratio, **agreed, "pairs": [], "memory": memory, **sides[0].facts}


# --- what both sides are given


def make(folder: Path, size: str, causal: bool, positions: int, vocabulary: int = 0, blocks: int = 256) -> None:
    """Makes weights, a tokenizer with a word for each token, and a text: `blocks` lines of one block each."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = make_tokenizer(vocabulary or vocabulary_of(size, causal))
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(SEED)
    make_model(tokenizer, size, causal, positions).save_pretrained(folder / "model")
    words = [f"w{i}" for i in range(len(tokenizer) - len(SPECIAL))]
    # Skewed, so that there is something to learn.
    drawn = (len(words) * np.random.default_rng(SEED).random((blocks, positions)) ** 3).astype(int)
    lines = [" ".join(words[i] for i in row) for row in drawn]
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    (folder / "validation.txt").write_text("\n".join(lines[:2]) + "\n")


def vocabulary_of(size: str, causal: bool) -> int:
    """Returns the number of tokens that a model of a size knows."""
    return SIZES[size][4 if causal else 5]


def make_tokenizer(count: int) -> Any:
    """Returns a tokenizer of `count` tokens, a word for each but the special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL.values(), *(f"w{i}" for i in range(count - len(SPECIAL)))]
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=known, **SPECIAL)


def make_model(tokenizer: Any, size: str, causal: bool, positions: int) -> Any:
    """Returns a model of a size with random weights."""
    from lmlab.models.loading import from_scratch

    layers, width, heads, *_ = SIZES[size]
    if causal:
        config = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": max(positions, 1024)}
        return from_scratch(tokenizer, "AutoModelForCausalLM", "gpt2", config)
    config = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    config |= {"intermediate_size": 4 * width, "max_position_embeddings": max(positions, 512) + 2}
    config |= {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return from_scratch(tokenizer, "AutoModelForMaskedLM", "roberta", config)


class Batches:
    """The peers' (input_ids, labels), both [B, T]: lmlab's own batches, made before the clock starts.

    Shapes: B blocks, T positions.
    """

    def __init__(self, settings: Settings, folder: Path, shift: int):
        """Makes all batches; a label stands `shift` positions after the one that predicts its token."""
        from transformers import AutoTokenizer

        from lmlab.data.options import Preprocessing
        from lmlab.data.prepared import prepare
        from lmlab.data.sources import load_files
        from lmlab.objectives.clm import CausalLM
        from lmlab.objectives.mlm import MaskedLM

        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        corpus = load_files(str(folder / "train.txt"), "text", str(folder / "validation.txt"), "line")
        choices = Preprocessing(settings.positions, end_of_text=False)
        self.blocks: Any = prepare(corpus, choices, lambda texts: tokenizer, None, folder / "lmlab").train
        self.objective: Any = CausalLM() if settings.causal else MaskedLM(tokenizer)
        self.pad_id, self.batch_size, self.shift = tokenizer.pad_token_id, settings.batch_size, shift
        self.made: dict[int, Any] = {}

    def prepare(self, first: int, count: int) -> None:
        import torch

        # The Trainer's loader reads ahead. Pinned memory is copied to a GPU while that works on.
        pin = torch.cuda.is_available()
        numbers = range(first, first + count + 2)
        self.made = {i: tuple(part.pin_memory() if pin else part for part in self[i]) for i in numbers}

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        import torch

        from lmlab.data.datamodule import collate
        from lmlab.data.sampler import draws

        if number in self.made:
            return self.made[number]
        drawn = draws(SEED, number * self.batch_size, self.batch_size, len(self.blocks))
        batch = collate(self.blocks, drawn, self.objective, SEED, self.pad_id, number)
        labels = torch.full((batch.input_ids.numel(),), -100)
        labels[batch.positions + self.shift] = batch.targets
        return batch.input_ids, labels.view_as(batch.input_ids)


def load(folder: Path, causal: bool, **options: Any) -> Any:
    """Loads the model by the guide's line."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_pretrained(folder / "model", **options)


def flops_of_step(settings: Settings, folder: Path) -> float | None:
    """Returns the model's operations in a step of forward and backward pass; None if they are not known.

    Both sides get the same: the logits of positions without a label are no part of the model's work.
    """
    from lmlab.models.flops import Flops

    flops = Flops.from_model(load(folder, settings.causal))
    if flops is None:
        return None
    batches, count = Batches(settings, folder, shift=0), 8
    targets = sum(int((batches[number][1] != -100).sum()) for number in range(count)) / count
    return flops.step(settings.batch_size * settings.positions, round(targets), settings.positions)


# --- the sides, each in a process of its own


def serve(name: str, values: dict[str, Any], folder: str, turns: Turns) -> None:
    settings = Settings(**values)
    if name == "trainer":
        trainer_side(settings, Path(folder), turns)
    elif name in ("loop", "compiled"):
        loop_side(settings, Path(folder), turns, compiled=name == "compiled")
    elif name == "lightning":
        lightning_side(settings, Path(folder), turns)
    else:
        lmlab_side(settings, Path(folder), turns, name)


def lmlab_side(settings: Settings, folder: Path, turns: Turns, name: str) -> None:
    """Runs `python -m lmlab.train` as it is, with a callback that waits for its turn."""
    import torch

    import lmlab.training.module  # noqa: F401 (as a run does)
    from benchmarks.callback import InTurns
    from lmlab.train import main

    InTurns.turns = turns
    turns.ready()
    sys.argv = [
        "lmlab.train",
        f"objective={settings.objective}",
        "model=pretrained",
        f"model.name={folder}/model",
        f"tokenizer.name={folder}/tokenizer",
        "data=files",
        f"data.train={folder}/train.txt",
        f"data.validation={folder}/validation.txt",
        "data.document=line",
        f"preprocess.block_size={settings.positions}",
        "preprocess.end_of_text=false",
        f"batch_size={settings.batch_size}",
        f"seed={SEED}",
        f"optim.lr={LR}",
        f"optim.weight_decay={WEIGHT_DECAY}",
        f"optim.warmup_steps={WARMUP_STEPS}",
        f"trainer={'gpu' if torch.cuda.is_available() else 'cpu'}",
        f"trainer.precision={settings.precision}",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS}",
        "logger=file",
        "+callbacks.in_turns._target_=benchmarks.callback.InTurns",
        f"hydra.run.dir={folder}/{name}",
        *settings.lmlab,
    ]
    main()


def trainer_side(settings: Settings, folder: Path, turns: Turns) -> None:
    """Runs the guide's code, "Train"; rows come labelled, in lmlab's order."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    turns.ready()
    # The model shifts causal labels itself.
    batches = Batches(settings, folder, shift=int(settings.causal))
    losses: list[Any] = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return STEPS * settings.batch_size

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids, labels = (part[index % settings.batch_size] for part in batches[index // settings.batch_size])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    class InTurns(TrainerCallback):
        def on_train_begin(self, *args: Any, model: Any, **others: Any) -> None:
            turns.start(model, batches.prepare)

        def on_step_end(self, *args: Any, model: Any, **others: Any) -> None:
            if turns.step(losses.pop()):
                turns.start(model, batches.prepare)

    class KeepsLosses(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            losses.append(loss.detach())
            return loss

    training_args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_STEPS,
        max_steps=STEPS,
        per_device_train_batch_size=settings.batch_size,
        bf16=settings.precision == "bf16-mixed",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    KeepsLosses(
        model=load(folder, settings.causal), args=training_args, train_dataset=Rows(), callbacks=[InTurns()]
    ).train()


def loop_side(settings: Settings, folder: Path, turns: Turns, compiled: bool) -> None:
    """Runs a plain loop like nanoGPT's: the floor; like nanoGPT's also in compiling model and loss as a whole."""
    import torch
    from torch.nn import functional as F
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.utils import logging

    turns.ready()
    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = Batches(settings, folder, shift=0)
    # Under the compiler transformers builds a mask, with which there is no flash attention, unless a kind of attention
    # says that it needs none. No block is padded.
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    model = load(folder, settings.causal, attn_implementation="sdpa_without_mask").to(device).train()
    optimizer, scheduler = make_optimizer(model)
    half = torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16-mixed")
    options = {"use_cache": False} if settings.causal else {}

    def loss_of(input_ids: Any, labels: Any) -> Any:
        logits = model(input_ids=input_ids, **options).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    if compiled:
        loss_of = torch.compile(loss_of)
    turns.start(model, batches.prepare)
    for number in range(STEPS):
        input_ids, labels = (tensor.to(device, non_blocking=True) for tensor in batches[number])
        with half:
            loss = loss_of(input_ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if turns.step(loss.detach()):
            turns.start(model, batches.prepare)


def lightning_side(settings: Settings, folder: Path, turns: Turns) -> None:
    """Runs a LightningModule of a few lines: what Lightning itself takes."""
    import lightning as L
    import torch
    from torch.nn import functional as F

    from lmlab.evaluation.certify import silence_lightning

    turns.ready()
    silence_lightning()
    batches = Batches(settings, folder, shift=0)
    options = {"use_cache": False} if settings.causal else {}

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = load(folder, settings.causal).train()

        def training_step(self, batch: Any, index: int) -> Any:
            input_ids, labels = batch
            logits = self.model(input_ids=input_ids, **options).logits
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = make_optimizer(self.model)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return STEPS

        def __getitem__(self, number: int) -> Any:
            return batches[number]

    class InTurns(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            turns.start(module.model, batches.prepare)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            if turns.step(outputs["loss"]):
                turns.start(module.model, batches.prepare)

    L.Trainer(
        devices=1,
        precision=settings.precision,
        max_steps=STEPS,
        gradient_clip_val=1.0,
        callbacks=[InTurns()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), torch.utils.data.DataLoader(Rows(), batch_size=None))


def make_optimizer(model: Any) -> tuple[Any, Any]:
    """Returns lmlab's AdamW and its schedule, for a peer that makes its own."""
    import torch

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], lr=LR, fused=True
    )
    factor = lambda step: min(step / WARMUP_STEPS, (STEPS - step) / (STEPS - WARMUP_STEPS))  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


if __name__ == "__main__":
    from lmlab.config.explain import known_keys

    verb("train", __doc__, Settings, compare, lmlab_keys=lambda: known_keys("train"))
