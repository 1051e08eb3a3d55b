"""The first batch of a run as text, in which each token says what it is to the model.

Shapes: T positions of a sample.
"""

from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from lmlab.config import schema
from lmlab.data.datamodule import Batch, collate
from lmlab.data.mixture import order_of
from lmlab.data.sampler import TrainSampler

LONGEST = 192  # tokens of a sample that are shown
SPACE = "␣"
CONTROL = {code: 0x2400 + code for code in range(32)} | {ord("\n"): "↵", 127: "␡"}
"""Signs for the control characters of a text, which would act on the terminal."""
KINDS = {
    "input": ("", "read, and no target"),
    "target": ("green", "read, and the target of a position before it"),
    "written": ("green", "read and written by the decoder"),
    "masked": ("black on red", "a target, hidden behind the mask token"),
    "random": ("black on yellow", "a target, another token in its place"),
    "kept": ("black on green", "a target that stays as it is"),
    "end": ("black on cyan", "end of a document"),
    "padding": ("dim", "padding"),
}
"""The style and the meaning of each kind of token."""

Piece = tuple[str, str]
"""A kind, and the text of tokens of it."""


def first_batch(cfg: DictConfig, data: Any, objective: Any, steps: int, pad_id: int) -> Batch:
    """Returns the batch that rank 0 trains on first."""
    world, accumulate = schema.world(cfg.trainer), cfg.trainer.accumulate_grad_batches
    sizes, lengths = schema.batch_sizes(cfg), schema.block_lengths(cfg)
    order = order_of(data.train, sizes.before(steps))
    sampler = TrainSampler(order, sizes, steps, cfg.seed, 0, world, accumulate)
    number, draws = next(iter(sampler))
    return collate(
        data.train, draws, objective, cfg.seed, pad_id, number, length=None if lengths is None else lengths.of(0)
    )


def sample_pieces(batch: Batch, row: int, tokenizer: Any, shift: int) -> list[Piece]:
    """Returns a sample of a batch as text, in pieces by the kind of their tokens.

    Args:
        shift: the `target_shift` of the objective.
    """
    if batch.decoder_ids is not None:
        return seq2seq_pieces(batch, row, tokenizer)
    width = batch.input_ids.shape[1]
    length = width if batch.attention_mask is None else int(batch.attention_mask[row].sum())
    inputs = batch.input_ids[row, : min(length, LONGEST)].tolist()
    chosen = torch.arange(len(batch.positions)) if batch.hidden is None else batch.hidden
    chosen = chosen[batch.positions[chosen] // width == row]
    positions = batch.positions[chosen] % width + shift
    targets = dict(zip(positions.tolist(), batch.targets[chosen].tolist(), strict=True))
    tokens = [targets.get(position, token) for position, token in enumerate(inputs)]
    pieces, before = list[Piece](), ""
    for position, (token, original) in enumerate(zip(inputs, tokens, strict=True)):
        text, said = decode(tokenizer, tokens[: position + 1]), ""
        # The last of several tokens has their character: before that, it decodes to a replacement character.
        if not text.endswith("\ufffd") or position + 1 == len(tokens):
            said, before = text[len(before) :], text
        if token != original:
            kind = "masked" if token == tokenizer.mask_token_id else "random"
        elif token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            kind = "end"
        elif position not in targets:
            kind = "input"
        else:
            kind = "target" if shift else "kept"
        if kind == "random":
            said = f"{said}→{decode(tokenizer, [token]).strip() or SPACE}"
        if pieces and pieces[-1][0] == kind and kind in ("input", "target"):
            said = pieces.pop()[1] + said
        pieces.append((kind, said))
    if length > LONGEST:
        pieces.append(("padding", f" … {length - LONGEST} tokens more"))
    if width > length:
        pieces.append(("padding", f" pad×{width - length}"))
    return pieces


def seq2seq_pieces(batch: Batch, row: int, tokenizer: Any) -> list[Piece]:
    """Returns what the encoder reads in a sample of a batch, and what the decoder writes."""
    assert batch.decoder_ids is not None
    width, ids = batch.input_ids.shape[1], batch.input_ids[row]
    inputs = ids if batch.attention_mask is None else ids[batch.attention_mask[row].bool()]
    targets = batch.targets[batch.positions // batch.decoder_ids.shape[1] == row]
    read, written = (decode(tokenizer, part[:LONGEST].tolist()) for part in (inputs, targets))
    padding = [("padding", f" pad×{width - len(inputs)}")] if width > len(inputs) else []
    return [("input", read), *padding, ("written", f" {written}")]


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Returns the text of tokens, with its spaces as they are."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def render(pieces: list[Piece], unmarked: str) -> Text:
    """Returns pieces in the colours of their kinds and, but for the `unmarked` kind, in brackets with its name."""
    text = Text()
    for kind, said in pieces:
        said = said.translate(CONTROL)
        if kind != unmarked:
            said = f"{' ' * said.startswith(' ')}[{kind}:{said.strip() or SPACE}]"
        text.append(said, KINDS[kind][0])
    return text


def describe_weights(batch: Batch, row: int) -> str:
    """Returns how much the targets of a sample weigh in the loss; the empty string if it has none."""
    assert batch.weights is not None
    weights = batch.weights[batch.positions // batch.input_ids.shape[1] == row].tolist()
    least, most = (f"{weight:.3g}" for weight in (min(weights, default=0), max(weights, default=0)))
    return f"weight of each target: {least}{'' if least == most else f' to {most}'}" if weights else ""


def describe_documents(batch: Batch, row: int) -> str:
    """Returns the lengths of the documents of a sample, which do not see one another."""
    assert batch.document_positions is not None
    length = batch.input_ids.shape[1] if batch.attention_mask is None else int(batch.attention_mask[row].sum())
    starts = torch.nonzero(batch.document_positions[row, :length] == 0).flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], length], strict=True)]
    of = ", ".join(map(str, lengths))
    return f"documents that do not see one another, of {of} tokens" if len(lengths) > 1 else "one document"


def show_samples(batch: Batch, tokenizer: Any, shift: int, console: Console, count: int = 3) -> None:
    """Prints the first samples of a batch, under a legend of the kinds of their tokens.

    Args:
        shift: the `target_shift` of the objective.
    """
    size, unmarked = len(batch.input_ids), "target" if shift else "input"
    samples = [sample_pieces(batch, row, tokenizer, shift) for row in range(min(count, size))]
    console.print(Text("First batch", style="italic"))
    console.print(f"{len(samples)} of the {size} samples that the first device starts with", highlight=False)
    for kind, (style, meaning) in KINDS.items():
        if any(kind == of_piece for sample in samples for of_piece, _ in sample):
            console.print(Text(f"  {'(unmarked)' if kind == unmarked else f'[{kind}:…]':<11} {meaning}", style))
    for number, sample in enumerate(samples, 1):
        console.print(Text(f"{number}  ").append_text(render(sample, unmarked)))
        if batch.document_positions is not None:
            console.print(Text(f"   {describe_documents(batch, number - 1)}", "dim"))
        if batch.weights is not None and batch.hidden is None:
            console.print(Text(f"   {describe_weights(batch, number - 1)}", "dim"))
    if batch.hidden is None and (batch.weights is not None or batch.divisor != len(batch.targets)):
        loss = f"the nll of {len(batch.targets)} targets, each times its weight, in sum, divided by {batch.divisor}"
        console.print(f"Loss of all {size} samples: {loss}", highlight=False)
