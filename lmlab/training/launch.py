"""Starting the ranks of a run on this machine.

Lightning's own launcher replays the command line in its children, `--multirun` included;
here every rank reads the composed config instead (promise 5).
"""

import json
import logging
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lmlab.errors import UserError


def launch(verb: str, run_dir: Path, devices: int) -> None:
    """Run `python -m lmlab.worker VERB RUN_DIR` once per device, and wait for all.

    Raises:
        UserError: a rank ended with an error.
    """
    # The agent reports what each rank prints itself.
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads or str(max(1, (os.cpu_count() or 1) // devices))
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.5,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "lmlab.worker", verb, str(run_dir))
        except SignalException as error:
            raise UserError(f"stopped by {error.sigval.name}; what was kept is in {run_dir}.") from error
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            # A rank that met a person's error leaves its message; any other has printed its traceback.
            if failure.message and not failure.message.startswith("To enable traceback"):
                raise UserError(failure.message) from error
            raise UserError(
                f"rank {rank} ended with exit code {failure.exitcode}, and the other ranks were stopped."
            ) from error
        finally:
            # The next run of this process may have another number of devices.
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]


def leave_message(message: str) -> None:
    """Hand an error of this rank to the process that launched it, which shows it once for all ranks."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))
    else:
        print(f"error: {message}", file=sys.stderr)
