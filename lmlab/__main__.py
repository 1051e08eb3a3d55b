"""Runs `lmlab COMMAND …` and `python -m lmlab COMMAND …` as `python -m lmlab.COMMAND …`."""

import runpy
import sys

from lmlab import early

COMMANDS = {
    "train": "train a model, measure it, export it; every combination of values with -m",
    "preview": "what a training command would do, and what it would take",
    "prepare": "prepare a large corpus once, by several processes or jobs, for data=prepared",
    "resume": "go on with a run, or run its experiment again",
    "sweep": "where a sweep stands; run the rest of it",
    "evaluate": "measure a model, and certify its metrics",
    "compare": "whether the difference between evaluations is real",
    "scale": "fit a scaling law to runs of several sizes and budgets",
    "predict": "let a model go on with a text, or fill its masks",
    "export": "write a model as ONNX or GGUF, for other tools",
    "report": "a page about runs, with charts and tables",
    "push": "put a finished run on the Hugging Face hub",
    "dashboard": "a workspace and a report page in W&B",
    "doctor": "whether this machine can do what lmlab promises",
}


def main() -> None:
    """Runs the command that the first word names, or lists the commands."""
    early.heed()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {command:<{width}}  {does}" for command, does in COMMANDS.items())
        print(f"usage: lmlab COMMAND …\n\n{listed}\n\nFor all of a command: lmlab COMMAND --help")
    elif name == "--version":
        from lmlab import __version__

        print(f"lmlab {__version__}")
    elif name not in COMMANDS:
        from lmlab.errors import nearest

        sys.exit(f'error: there is no command "{name}".{nearest(name, COMMANDS)} Commands: {", ".join(COMMANDS)}.')
    else:
        sys.argv[1:] = arguments
        # As -m does it: whoever asks what this process runs, as W&B does, is told the command's own module.
        runpy.run_module(f"lmlab.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
