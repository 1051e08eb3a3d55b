"""What the model is shown and asked for in the first batch of a run.

Shapes: T positions of a sample.
"""

from typing import Any, NamedTuple

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from lmlab.config import schema
from lmlab.data.datamodule import Batch, collate
from lmlab.data.sampler import TrainSampler

SPACE = "␣"
HALF = "\ufffd"  # what bytes decode to that are no whole character
SIGNS = {code: 0x2400 + code for code in range(32)} | {ord("\n"): "↵", 127: "␡"}
"""Control characters of a text, as signs for them: the terminal is not to heed them."""
LONGEST = 192  # tokens of a sample that are shown

STYLES = {
    "input": "",
    "label": "green",
    "masked": "black on red",
    "random": "black on yellow",
    "kept": "black on green",
    "edge": "black on cyan",
    "padding": "dim",
}
MEANING = {
    "causal": {
        "input": "read, and no label",
        "label": "read, and the label of the token before it",
        "edge": "end of a document",
        "padding": "padding",
    },
    "masked": {
        "input": "read, and no label",
        "masked": "a label, hidden behind the mask token",
        "random": "a label, a random token in its place",
        "kept": "a label that stays as it is",
        "edge": "end of a document",
        "padding": "padding",
    },
}


class Piece(NamedTuple):
    """Tokens of one kind that follow one another."""

    kind: str
    text: str


def first_batch(cfg: DictConfig, data: Any, objective: Any, steps: int, pad_id: int) -> Batch:
    """What rank 0 trains on first."""
    world, accumulate = schema.world(cfg.trainer), cfg.trainer.accumulate_grad_batches
    sampler = TrainSampler(len(data.train), cfg.batch_size, steps, cfg.seed, 0, world, accumulate)
    number, draws = next(iter(sampler))
    return collate(data.train, draws, objective, cfg.seed, pad_id, number)


def pieces(batch: Batch, row: int, tokenizer: Any, causal: bool) -> list[Piece]:
    """One sample of a batch, as text with the kind of each of its tokens."""
    width = batch.input_ids.shape[1]
    length = width if batch.attention_mask is None else int(batch.attention_mask[row].sum())
    inputs = batch.input_ids[row, :length].tolist()
    here = (batch.positions // width == row).nonzero().flatten()
    labels = dict(zip((batch.positions[here] % width).tolist(), batch.targets[here].tolist(), strict=True))
    if causal:
        kinds = ["label" if at - 1 in labels else "input" for at in range(length)]
        original = inputs
    else:
        kinds = [kind(token, labels.get(at), tokenizer.mask_token_id) for at, token in enumerate(inputs)]
        original = [labels.get(at, token) for at, token in enumerate(inputs)]
    found: list[Piece] = []
    before = ""
    for at in range(min(length, LONGEST)):
        text, said = decoded(tokenizer, original[: at + 1]), ""
        if not text.endswith(HALF) or at + 1 == min(length, LONGEST):  # a character of several tokens is the last one's
            said, before = text[len(before) :], text
        name = kinds[at]
        if original[at] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            name = "edge"
        if name == "random":
            said = f"{said}→{decoded(tokenizer, [inputs[at]]).strip() or SPACE}"
        if found and found[-1].kind == name and name in ("input", "label"):
            found[-1] = Piece(name, found[-1].text + said)
        else:
            found.append(Piece(name, said))
    if length > LONGEST:
        found.append(Piece("padding", f" … {length - LONGEST} tokens more"))
    if width > length:
        found.append(Piece("padding", f" pad×{width - length}"))
    return found


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def kind(token: int, label: int | None, mask_id: int) -> str:
    """Of a position of a masked sample."""
    if label is None:
        return "input"
    return "masked" if token == mask_id else "kept" if token == label else "random"


def drawn(found: list[Piece], usual: str, coloured: bool) -> Text:
    """Pieces in colours; without them in brackets with their kind, all but the `usual` one."""
    text = Text()
    for name, said in found:
        said = said.translate(SIGNS)
        if coloured:
            text.append(said, STYLES[name])
        elif name == usual:
            text.append(said)
        else:
            space = " " if said.startswith(" ") else ""
            text.append(f"{space}[{name}:{said.strip() or SPACE}]")
    return text


def show_samples(batch: Batch, tokenizer: Any, causal: bool, console: Console, count: int = 3) -> None:
    """The first samples of a batch, under a legend."""
    coloured = console.is_terminal and not console.no_color
    meaning, usual = (MEANING["causal"], "label") if causal else (MEANING["masked"], "input")
    samples = [pieces(batch, row, tokenizer, causal) for row in range(min(count, len(batch.input_ids)))]
    console.print(Text("First batch", style="italic"))
    console.print(Text(f"{len(samples)} of the {len(batch.input_ids)} samples that the first device starts with"))
    for name, words in meaning.items():
        mark = f"[{name}:…]" if name != usual else "(unmarked)"
        console.print(
            Text("  ").append_text(Text(name, STYLES[name]) if coloured else Text(f"{mark:<12}")), Text(words)
        )
    for number, sample in enumerate(samples, 1):
        console.print(Text(f"{number}  ").append_text(drawn(sample, usual, coloured)))
