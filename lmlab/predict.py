"""`python -m lmlab.predict MODEL TEXT…`: prints what a trained model makes of texts.

A causal model continues them, a masked one fills their masks, a diffusion model does either, some tokens at a time, an
encoder-decoder writes the spans that are missing in them, and a discriminator says which of their tokens were replaced.
The command takes ordinary arguments, so a text is taken as typed, commas, quotes and `=` included.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lmlab.config import targets, trust
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, shown_plainly, stopped_with
from lmlab.hub import check_directory, is_adapter
from lmlab.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHOLE = "a whole number, 1 or more"
SAMPLING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "top_k": (f"{WHOLE}; that of all tokens is no limit", lambda value: type(value) is int and value >= 1),
    "max_new_tokens": (WHOLE, lambda value: type(value) is int and value >= 1),
    "steps": (WHOLE, lambda value: type(value) is int and value >= 1),
    # Logits over a smaller one would not fit into 32 bits.
    "temperature": ("1e-30 or more; --greedy takes the most likely token", lambda value: 1e-30 <= value < math.inf),
    "top_p": ("more than 0, and 1 at most", lambda value: 0 < value <= 1),
}
"""Options of `generate` and `unmask` that have an argument of their own: what they may be, in words and as a check."""


def seed(text: str) -> int:
    """Converts an argument to a number that torch takes as a seed."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2**63 - 1, not {text}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments."""
    p = Arguments(
        prog="python -m lmlab.predict",
        description="Continue a text (causal model), fill its masks (masked model), do either (diffusion model), "
        "write its missing spans (encoder-decoder), or find its replaced tokens (discriminator).",
    )
    p.add_argument("model", help="run directory, exported directory, .gguf file, or hub id, also ID@REVISION")
    p.add_argument("--revision", help="of a hub id: branch, tag or commit")
    p.add_argument("texts", nargs="*", help="texts; - or none reads them from standard input, one per line")
    p.add_argument("--file", help="a file of texts, one per line")
    p.add_argument("--top-k", type=int, help="masks: how many candidates (5); causal: sample from so many (50)")
    p.add_argument("--max-new-tokens", type=int, help="how many tokens to add (100)")
    p.add_argument("--temperature", type=float)
    p.add_argument("--top-p", type=float, help="sample from this share of the probability (0.95)")
    p.add_argument("--steps", type=int, help="diffusion: forward passes that unmask a text (one for each token)")
    p.add_argument("--greedy", action="store_true", help="always the most likely token")
    p.add_argument("--seed", type=seed, default=0, help="decides what is sampled (0)")
    p.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any option of transformers' generate, such as --option repetition_penalty=1.2",
    )
    add_trust(p)
    p.add_argument("--json", action="store_true", help="one JSON object per line")
    return p


def add_trust(p: argparse.ArgumentParser) -> None:
    """Adds the argument that `load` reads for code that is not lmlab's."""
    p.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let code run that is not lmlab's: of a torch module, or of a run before its end what its config names",
    )


def main() -> None:
    """Runs the command."""
    with shown_plainly(), SIGNALS.heeded():
        predict(parser().parse_intermixed_args())  # options may stand between model and texts


def predict(arguments: argparse.Namespace) -> None:
    """Prints what the model makes of each text, in order."""
    texts, options = read_texts(arguments), generate_options(arguments)
    model, tokenizer = load(arguments)

    from lmlab.models import generation

    way = way_of_objective(arguments) or generation.way_of_writing(model)
    for mask in generation.MASKS if way == "generate" else ():
        if any(mask in text for text in texts):
            raise UserError(f"{mask}: the model is causal, and continues texts. Fill masks with a masked model.")
    if way == "unmask" and arguments.option:
        raise UserError(f"--option {arguments.option[0]}: it is for a causal model, and this one is a diffusion model.")
    if way != "unmask" and "steps" in options:
        raise UserError("--steps is for a run with objective=diffusion, which replaces several masks in a step.")
    with stopped_with(""):
        for text in texts:
            if way == "fill_mask":
                masks = generation.fill_mask(model, tokenizer, text, arguments.top_k or 5)
                rows: list[dict[str, Any]] = [{"text": text, "masks": masks}]
                shown = "\n".join(candidate_lines(masks))
            elif way == "detect":
                tokens = generation.detect(model, tokenizer, text)
                rows = [{"text": text, "tokens": tokens}]
                shown = "\n".join(f"{t['score']:.4f}  {t['token']:>6}  {t['token_str']!r}" for t in tokens)
            else:
                continued = getattr(generation, way)(model, tokenizer, text, arguments.seed, **options)
                rows = [{"text": text, "generated_text": one} for one in continued]
                shown = "\n".join(continued)
            print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if arguments.json else shown)


def way_of_objective(arguments: argparse.Namespace) -> str | None:
    """Returns the function of `lmlab.models.generation` that the objective of a run names, if it names one.

    None if the model is no run directory, or if the objective is a class whose code is not trusted.
    """
    run = RunDirectory(arguments.model)
    if not run.has_config():
        return None

    from lmlab.config.compose import read_config

    block = read_config(run.path).objective
    try:
        trust.check_trusted(OmegaConf.create({"objective": block}), arguments.trust)
    except UserError:  # the class of its model says how
        return None
    return getattr(targets.target(block, "objective"), "writes", None)


def load(arguments: argparse.Namespace) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Loads the model and its tokenizer; of a run that has not ended, its best weights so far."""
    run = RunDirectory(arguments.model)
    name = str(run.model) if run.model.is_dir() else arguments.model
    check_directory("model", name, "the first argument")
    unfinished, known = run.unfinished(), Path(name, "config.json").is_file() or is_adapter(name)
    if not unfinished and Path(name).is_dir() and not known:
        raise UserError(f"{name} is neither a run with an exported model nor a model (it has no config.json).")

    from transformers.utils import logging

    from lmlab.models import generation

    logging.disable_progress_bar()
    if not unfinished:
        return generation.load(name, arguments.revision, trusted_module(name, arguments.trust))

    from lmlab.config.snapshot import snapshot

    with TemporaryDirectory() as folder:
        path = Path(folder, "snapshot")
        print(f"From {snapshot(run, path, arguments.trust)}.", file=sys.stderr)
        name = str(RunDirectory(path).model)
        return generation.load(name, make_module=trusted_module(name, arguments.trust))


def trusted_module(name: str, trusted: list[str]) -> Callable[..., Any] | None:
    """Returns a function that makes the torch module which a directory holds; None if it holds another model.

    Raises:
        UserError: the code of the module is not trusted.
    """
    module = trust.exported_module(Path(name))
    if module is None:
        return None
    block = OmegaConf.create({"model": {"module": module}})
    trust.check_trusted(block, trusted)
    return partial(targets.build, block.model.module, "model.module", empty=False)


def read_texts(arguments: argparse.Namespace) -> list[str]:
    """Returns the texts of the arguments, a file, or standard input; empty lines are none."""
    texts = list(arguments.texts)

    def lines(text: str) -> list[str]:
        return [line for line in text.split("\n") if line.strip()]  # `splitlines` would also cut at form feeds

    try:
        if arguments.file:
            texts += lines(Path(arguments.file).read_text("utf-8"))
        if texts == ["-"] or not texts:
            texts = lines(sys.stdin.read())
        "".join(texts).encode()  # a byte of the command line that is no UTF-8 is a lone surrogate here
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"the texts are not UTF-8 ({error.reason}): convert them first.") from error
    except OSError as error:
        raise UserError(f"--file {arguments.file}: {error.strerror}.") from error
    if not texts:
        raise UserError("no text to go on with: give it after the model, by --file, or on standard input.")
    return texts


def generate_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options for `generate`; the value of an `--option` is read as JSON where it is JSON.

    Raises:
        UserError: one that transformers would take in silence, or refuse only after the model was loaded.
    """
    options: dict[str, Any] = {}
    for name in SAMPLING:
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if arguments.greedy:
        sampling = [name for name in ("temperature", "top_k", "top_p") if name in options]
        if sampling:
            raise UserError(f"--greedy does not sample: leave out --{sampling[0].replace('_', '-')}, or --greedy.")
        options["do_sample"] = False
    for option in arguments.option:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--option {option}: write it as KEY=VALUE.")
        try:
            options[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[key] = value
    for name, (words, possible) in SAMPLING.items():
        value = options.get(name)
        if value is not None and not (type(value) in (int, float) and possible(value)):
            shown = f"{value:g}" if type(value) is float else value
            raise UserError(f"--{name.replace('_', '-')} {shown}: it has to be {words}.")
    return options


def candidate_lines(masks: list[list[dict[str, Any]]]) -> list[str]:
    """Returns a line for each candidate of each mask, under the number of its mask where there are several."""
    lines = []
    for number, candidates in enumerate(masks, 1):
        lines += [f"mask {number}:"] if len(masks) > 1 else []
        lines += [f"{c['score']:.4f}  {c['token']:>6}  {c['token_str']!r:<16}  {c['sequence']}" for c in candidates]
    return lines


if __name__ == "__main__":
    main()
