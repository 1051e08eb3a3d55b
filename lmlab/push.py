"""`python -m lmlab.push RUN OWNER/NAME --license LICENSE`: put a finished run on the Hugging Face hub.

Takes ordinary arguments. The token is the hub client's own: `hf auth login`, or the variable HF_TOKEN.
"""

import argparse
from pathlib import Path

from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, shown_plainly, stopped_with

EXAMPLES = """\
  python -m lmlab.push outputs/2026-01-31/12-00-00 me/my-model --license apache-2.0
  python -m lmlab.push outputs/2026-01-31/12-00-00 me/my-model --license apache-2.0 --series --private
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments."""
    p = Arguments(
        prog="python -m lmlab.push",
        description="Put a finished run on the Hugging Face hub: weights, tokenizer, a card, the evaluation, and the "
        "config that repeats it. A push that broke is repeated, and sends nothing twice.",
        epilog=f"The token is taken from HF_TOKEN, or from hf auth login.\n\nexamples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    p.add_argument("repository", metavar="OWNER/NAME", help="repository on the hub, which is made if there is none")
    p.add_argument("--license", help="of the model, as the hub names it: apache-2.0, mit, cc-by-4.0, other, …")
    p.add_argument("--series", action="store_true", help="also the series of models, each step N as tag step-N")
    p.add_argument("--private", action="store_true", help="make it a repository that only its owner sees")
    return p


def main() -> None:
    """Runs the command."""
    with shown_plainly(), SIGNALS.heeded():
        given = parser().parse_args()

        from lmlab.runs.directory import RunDirectory
        from lmlab.sharing.push import Destination, push

        destination = Destination(given.repository, given.license, given.private, given.series)
        with stopped_with("Push again: what was sent is not sent again."):
            print(push(RunDirectory(given.run), destination))


if __name__ == "__main__":
    main()
