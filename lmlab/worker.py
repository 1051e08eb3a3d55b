"""`python -m lmlab.worker RUN_DIR`: one rank of a run, started by torchrun.

It reads the composed config of the run directory and never sees the command line.
"""

import os
import sys
from pathlib import Path

from lmlab.config import read_config
from lmlab.errors import shown_plainly


def main() -> None:
    cfg = read_config(Path(sys.argv[1]))
    with shown_plainly(cfg.debug):
        from lmlab.train import train

        train(cfg)


if __name__ == "__main__":
    os.environ["PYTHONUNBUFFERED"] = "1"
    main()
