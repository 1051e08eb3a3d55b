"""`python -m lmlab.worker COMMAND RUN_DIR [CHECKPOINT]`: one rank of a run or an evaluation on this machine."""

import sys

from lmlab.config.rank import run_rank
from lmlab.distributed import launch
from lmlab.evaluate import measure
from lmlab.train import train_rank

WORK = {"train": train_rank, "evaluate": measure}


def main() -> None:
    launch.end_with_parent()
    name, *arguments = sys.argv[1:]
    run_rank(WORK[name], *arguments)


if __name__ == "__main__":
    main()
