"""Starts the ranks of a run on this machine, one process for each device, and waits for them.

One process composes the config, and every rank reads it from the run directory (promise 5).

Torch's elastic agent, which torchrun runs, does not start them. In torch 2.13 a second Ctrl-C begins its shutdown anew
and so waits as long as the first one, a rank that hangs after another has failed gets 30 seconds whatever its
`shutdown_timeout` says, and it opens the logs of ranks anew where a run goes on.

Nothing heavy is imported at the top: every command asks first which rank it is.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lmlab.distributed.ranks import LOG_LEVEL
from lmlab.distributed.signals import HEEDED, SIGNALS
from lmlab.errors import Stopped, UserError, cause_of
from lmlab.io import read_json, write_json

AFTER_A_FAILURE = 3.0  # seconds that the other ranks get to end by themselves
AFTER_A_STOP = 300.0  # seconds that they get when one has stopped for a signal: rank 0 sends W&B what it has


def launch(
    arguments: Sequence[str],
    ranks: int,
    log_of: Callable[[int], Path],
    variables: Mapping[str, str],
    advice: str = "",
) -> None:
    """Runs `python -m lmlab.worker ARGUMENTS…` once per rank, and waits until all have ended.

    Rank 0 writes to the terminal, the others to files.

    Args:
        arguments: the command, its run directory, and the checkpoint to go on from, if there is one.
        ranks: how many processes to start, one per device.
        log_of: gives the log file of a rank other than 0.
        variables: added to the environment of each rank.
        advice: what to do after a rank was killed or crashed, added to the message.

    Raises:
        UserError: a rank failed; the others were ended.
        Stopped: the ranks ended for a signal.
    """
    _store, address = meeting_point()
    env = {**os.environ, **address, **variables, "LMLAB_PARENT": str(os.getpid())}
    env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    env.setdefault(*LOG_LEVEL)
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder, SIGNALS.heeded(), SIGNALS.noted():
        try:
            for rank in range(ranks):
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LMLAB_REPORT": f"{folder}/{rank}"}
                if rank:
                    log_of(rank).parent.mkdir(exist_ok=True)
                with log_of(rank).open("ab") if rank else nullcontext() as log:
                    process = subprocess.Popen(
                        [sys.executable, "-u", "-m", "lmlab.worker", *arguments],
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # a Ctrl-C reaches the ranks once, from here
                    )
                processes.append(process)
            first = wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        codes = [process.returncode for process in processes]
        reports = {int(path.name): read_json(path) for path in Path(folder).glob("[0-9]*")}
    if first is not None:
        raise failure(first, codes, reports, log_of, advice)


def meeting_point() -> tuple[Any, dict[str, str]]:
    """Returns a store for ranks of this machine, to be held as long as they run, and the variables that name it."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    return store, address | {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # no rank is to make it


def wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all ranks have ended, or until their time is over once one has failed; passes a signal on to them.

    Returns:
        the rank that failed first, or None if none has.
    """
    first, deadline, passed_on = None, math.inf, 0
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and first is None:
            # One that was killed, whose code is negative, did not fail because another did.
            first = min(failed, key=lambda rank: (codes[rank] or 0, rank))
            deadline = time.monotonic() + (AFTER_A_STOP if stopped(codes[first]) else AFTER_A_FAILURE)
        if None not in codes or time.monotonic() > deadline:
            return first
        if SIGNALS.received != passed_on:
            passed_on = SIGNALS.received
            for process in ranks:
                process.send_signal(passed_on)
        time.sleep(0.1)


def stopped(code: int | None) -> bool:
    """Returns whether an exit code is that of `Stopped`."""
    return code is not None and code - 128 in HEEDED


def failure(
    first: int,
    codes: Sequence[int],
    reports: Mapping[int, Mapping[str, Any]],
    log_of: Callable[[int], Path],
    advice: str,
) -> Stopped | UserError:
    """Returns what to raise for ranks of which one has failed.

    Args:
        first: the rank that was seen to fail first.
        codes: the exit codes of all ranks.
        reports: what ranks have left by `report`.
    """
    if stopped(codes[first]):
        return Stopped(codes[first] - 128)
    if SIGNALS.received and not reports:  # the ranks were still importing
        return Stopped(SIGNALS.received)
    if codes[first] > 0 and reports:  # by their own clocks
        first = min(reports, key=lambda rank: reports[rank]["time"])
    code, report = codes[first], reports.get(first)
    if report and report["plainly"]:
        return UserError(report["text"], report["cause"])
    if report:
        print(report["text"], file=sys.stderr)
    what = f" ({report['text'].splitlines()[-1]})" if report else ""
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}{what}"
    who, others = (f"rank {first}", ", and the other ranks were stopped") if len(codes) > 1 else ("its process", "")
    why = " The system does that when memory runs out." if code == -signal.SIGKILL else ""
    log = f" Its log: {log_of(first)}" if first else ""
    return UserError(f"{who} {ended}{others}.{why}{log}{advice}", "killed" if code < 0 else "crashed")


def report(text: str, error: BaseException, plainly: bool) -> bool:
    """Leaves an error of this rank to the process that started it, which shows it.

    Args:
        text: the message, or the traceback of a defect.
        plainly: whether it is a message.

    Returns:
        True if lmlab started this rank; if not, nobody reads the report.
    """
    path = os.environ.get("LMLAB_REPORT")
    if path is not None:
        write_json(Path(path), {"text": text, "plainly": plainly, "cause": cause_of(error), "time": time.time()})
    return path is not None


def end_with_parent() -> None:
    """Lets the system kill this process when the one that started it ends, in whatever way."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, of Linux
    if os.getppid() != int(os.environ["LMLAB_PARENT"]):  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def traced(error: BaseException) -> str:
    """Returns the traceback of an error."""
    return "".join(traceback.format_exception(error)).rstrip()
