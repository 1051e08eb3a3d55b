"""`python -m lmlab.export MODEL onnx|gguf`: writes a trained model in a form that other tools read.

The command takes ordinary arguments.
"""

import argparse
from pathlib import Path

from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, check_installed, shown_plainly, stopped_with
from lmlab.hub import check_directory
from lmlab.io import empty_folders_removed, from_here, replaced
from lmlab.predict import add_trust, load
from lmlab.runs.directory import RunDirectory

FORMATS = {"onnx": "ONNX, for onnxruntime and browsers", "gguf": "GGUF, for llama.cpp and what builds on it"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "gguf": ("gguf", "accelerate")}
"""The packages that each format needs; the extra of lmlab that installs them has the name of the format."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments."""
    p = Arguments(
        prog="python -m lmlab.export",
        description="Write a model in a form that other tools read, and check that it gives the same logits there.",
    )
    p.add_argument("model", help="run directory, exported directory, .gguf file, or hub id")
    p.add_argument("format", choices=FORMATS, help="; ".join(f"{name}: {words}" for name, words in FORMATS.items()))
    p.add_argument("--output", type=Path, metavar="DIR", help="a new folder; by default onnx/ or gguf/ of the run")
    p.add_argument("--revision", help="of a hub id: branch, tag or commit")
    add_trust(p)
    return p


def main() -> None:
    """Runs the command."""
    with shown_plainly(), SIGNALS.heeded(), stopped_with("Nothing was written."):
        export(parser().parse_args())


def export(arguments: argparse.Namespace) -> None:
    """Writes the model to a new folder; nothing where the export does not give the logits of the model."""
    check_directory("model", arguments.model, "the first argument")
    folder = output_folder(arguments)
    check_installed(f"an export to {arguments.format.upper()}", arguments.format, *PACKAGES[arguments.format])
    model, tokenizer = load(arguments)

    from transformers.utils.logging import set_verbosity_error

    from lmlab.sharing import gguf, onnx

    set_verbosity_error()
    to = {"onnx": onnx, "gguf": gguf}[arguments.format]
    differences: list[float] = []
    try:
        with empty_folders_removed(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            replaced(folder, lambda beside: differences.append(to.write(model.float(), tokenizer, beside)))
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}.\nChoose another by --output DIR.") from error
    file, difference = from_here(folder / to.FILE), f"{differences[0]:.2g}"
    print(f"{file} gives the model's logits on ten texts: the largest difference is {difference}.")


def output_folder(arguments: argparse.Namespace) -> Path:
    """Returns the folder to write to.

    Raises:
        UserError: it holds something already, or none is named for a model that is no run.
    """
    run = RunDirectory(arguments.model)
    if arguments.output is None and not run.has_config():
        raise UserError(f"{arguments.model} is no run: name a folder for the export by --output DIR.")
    folder = (arguments.output or run.path / arguments.format).absolute()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{from_here(folder)} is there already: remove it, or choose another folder by --output DIR.")
    return folder


if __name__ == "__main__":
    main()
