"""`python -m lmlab.worker VERB RUN_DIR`: one rank of a run or an evaluation, started by torchrun.

It reads the composed config of the run directory and never sees the command line.
"""

import sys
from pathlib import Path

import torch.distributed as dist

from lmlab.config.compose import read_config
from lmlab.errors import plainly
from lmlab.evaluate import measure
from lmlab.train import train
from lmlab.training.launch import leave_message


def main() -> None:
    share = {"train": train, "evaluate": measure}[sys.argv[1]]
    cfg = read_config(Path(sys.argv[2]))
    try:
        share(cfg)
    except Exception as error:
        message = None if cfg.debug else plainly(error)
        if message is None:
            raise
        leave_message(message)
        sys.exit(1)
    finally:
        # Lightning leaves gloo's threads running, and a process that ends over them may abort.
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
