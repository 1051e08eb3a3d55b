"""`python -m lmlab.worker RUN_DIR`: one rank of a run, started by torchrun.

It reads the composed config of the run directory and never sees the command line.
"""

import sys
from pathlib import Path

from lmlab.config import read_config
from lmlab.errors import plainly
from lmlab.train import train
from lmlab.training.launch import leave_message


def main() -> None:
    cfg = read_config(Path(sys.argv[1]))
    try:
        train(cfg)
    except Exception as error:
        message = None if cfg.debug else plainly(error)
        if message is None:
            raise
        leave_message(message)
        sys.exit(1)


if __name__ == "__main__":
    main()
