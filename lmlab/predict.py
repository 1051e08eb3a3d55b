"""`python -m lmlab.predict MODEL TEXT…`: let a trained model speak.

Takes ordinary arguments, so a text is taken as typed, commas, quotes and `=` included.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, shown_plainly, stopped_with
from lmlab.hub import check_directory
from lmlab.runs.directory import RunDirectory


def seed(text: str) -> int:
    """An argument that torch takes as a seed."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2**63 - 1, not {text}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    p = Arguments(
        prog="python -m lmlab.predict",
        description="Go on with a text (causal model), or fill its masks (masked model).",
    )
    p.add_argument("model", help="run directory, exported directory, or hub id")
    p.add_argument("--revision", help="of a hub id: branch, tag or commit")
    p.add_argument("texts", nargs="*", help="texts; - or none reads them from standard input, one per line")
    p.add_argument("--file", help="a file of texts, one per line")
    p.add_argument("--top-k", type=int, help="masks: how many candidates (5); causal: sample from so many (50)")
    p.add_argument("--max-new-tokens", type=int, help="how far to go on (100)")
    p.add_argument("--temperature", type=float)
    p.add_argument("--top-p", type=float, help="sample from this share of the probability (0.95)")
    p.add_argument("--greedy", action="store_true", help="always the most likely token")
    p.add_argument("--seed", type=seed, default=0, help="decides what is sampled (0)")
    p.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any option of transformers' generate, such as --option repetition_penalty=1.2",
    )
    p.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="of a run before its end: let code run that its config names and that is not lmlab's",
    )
    p.add_argument("--json", action="store_true", help="one JSON object per line")
    return p


def main() -> None:
    with shown_plainly(), SIGNALS.heeded():
        predict(parser().parse_intermixed_args())  # options may stand between model and texts


def predict(arguments: argparse.Namespace) -> None:
    """Print what the model makes of each text, in order."""
    texts = texts_of(arguments)
    options = options_of(arguments)
    check_options(options)
    candidates = 5 if arguments.top_k is None else arguments.top_k
    run = RunDirectory(arguments.model)
    name = str(run.model) if run.model.is_dir() else arguments.model
    check_directory("model", name, "the first argument")
    if not run.unfinished() and Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise UserError(f"{name} is neither a run with an exported model nor a model (it has no config.json).")

    from transformers.utils import logging

    from lmlab.models import generation

    logging.disable_progress_bar()
    model, tokenizer = loaded(run, name, arguments)
    with stopped_with(""):
        for text in texts:
            if generation.fills_masks(model):
                filled = generation.fill_mask(model, tokenizer, text, candidates)
                show_filled(text, filled, arguments.json)
            else:
                for said in generation.generate(model, tokenizer, text, arguments.seed, **options):
                    row = {"text": text, "generated_text": said}
                    print(json.dumps(row, ensure_ascii=False) if arguments.json else said)


def loaded(run: RunDirectory, name: str, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A model of that name and its tokenizer; of a run that has not ended, its best weights so far."""
    from lmlab.models import generation

    if not run.unfinished():
        return generation.load(name, arguments.revision)
    from lmlab.config.snapshot import snapshot

    with TemporaryDirectory() as folder:
        path = Path(folder, "snapshot")
        print(f"From {snapshot(run, path, arguments.trust)}.", file=sys.stderr)
        return generation.load(str(RunDirectory(path).model))


def texts_of(arguments: argparse.Namespace) -> list[str]:
    """The texts of the arguments, a file, or standard input."""
    texts = list(arguments.texts)
    try:
        if arguments.file:
            texts += lines_of(Path(arguments.file).read_text("utf-8"))
        if texts == ["-"] or not texts:
            texts = lines_of(sys.stdin.read())
        "".join(texts).encode()  # a byte of the command line that is no UTF-8 is a lone surrogate here
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"the texts are not UTF-8 ({error.reason}): convert them first.") from error
    except OSError as error:
        raise UserError(f"--file {arguments.file}: {error.strerror}.") from error
    if not texts:
        raise UserError("no text to go on with: give it after the model, by --file, or on standard input.")
    return texts


def lines_of(text: str) -> list[str]:
    """The lines that are not empty; `splitlines` would also cut at form feeds and their like."""
    return [line for line in text.split("\n") if line.strip()]


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options for `generate`; a value is read as JSON where it is JSON."""
    options: dict[str, Any] = {
        name: value
        for name in ("top_k", "max_new_tokens", "temperature", "top_p")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.greedy:
        options["do_sample"] = False
    for option in arguments.option:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--option {option}: write it as KEY=VALUE.")
        try:
            options[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def check_options(options: dict[str, Any]) -> None:
    """Refuse sampling that transformers would take in silence, or only after the model was loaded."""
    wanted = {
        "top_k": (
            "a whole number, 1 or more; that of all tokens is no limit",
            lambda value: type(value) is int and value >= 1,
        ),
        "max_new_tokens": ("a whole number, 1 or more", lambda value: type(value) is int and value >= 1),
        "temperature": ("more than 0; --greedy takes the most likely token", lambda value: 0 < value < math.inf),
        "top_p": ("more than 0, and 1 at most", lambda value: 0 < value <= 1),
    }
    for name, (what, possible) in wanted.items():
        value = options.get(name)
        if value is not None and not (type(value) in (int, float) and possible(value)):
            said = f"{value:g}" if type(value) is float else value
            raise UserError(f"--{name.replace('_', '-')} {said}: it has to be {what}.")


def show_filled(text: str, filled: list[list[dict[str, Any]]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"text": text, "masks": filled}, ensure_ascii=False))
        return
    for number, candidates in enumerate(filled, 1):
        if len(filled) > 1:
            print(f"mask {number}:")
        for c in candidates:
            print(f"{c['score']:.4f}  {c['token']:>6}  {c['token_str']!r:<16}  {c['sequence']}")


if __name__ == "__main__":
    main()
