"""The ranks of a run on this machine, each a process of its own.

Lightning's own launcher replays the command line in its children, `--multirun` included. Here
one process composes the config (promise 5), and every other rank is told where it lies.

Nothing heavy is imported at the top: each verb asks first who started it.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmlab.distributed.ranks import LOG_LEVEL
from lmlab.distributed.signals import HEEDED
from lmlab.errors import Stopped, UserError, cause_of

GRACE = 3.0  # seconds that ranks get to end by themselves after one has failed
PATIENCE = 300.0  # and after one has stopped for a signal


def launch(
    arguments: list[str], ranks: int, log_of: Callable[[int], Path], variables: dict[str, str], advice: str = ""
) -> None:
    """Run `python -m lmlab.worker ARGUMENTS…` once per rank, and wait until all have ended.

    The output of rank 0 goes to the terminal, that of the others to files.

    Args:
        arguments: of the worker: the command, its run directory, and the checkpoint to go on from, if any.
        ranks: processes to start, one per device.
        log_of: the log file of a rank other than 0.
        variables: added to the environment of each rank.
        advice: what to do after a rank was killed or crashed; added to the message.

    Raises:
        UserError: a rank failed; the others were ended.
        Stopped: the ranks ended for a signal.
    """
    _held, meeting = meeting_point()
    common = os.environ | meeting
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    common["LMLAB_PARENT"] = str(os.getpid())
    common |= variables
    common.setdefault(*LOG_LEVEL)
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    command = [sys.executable, "-u", "-m", "lmlab.worker", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        processes: list[subprocess.Popen] = []
        with passed_on(processes) as asked:
            try:
                for rank in range(ranks):
                    env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LMLAB_REPORT": f"{folder}/{rank}"}
                    # Its own session: a Ctrl-C reaches the ranks once, from here.
                    settings: dict[str, Any] = {"env": env, "stdin": subprocess.DEVNULL, "start_new_session": True}
                    if rank:
                        log_of(rank).parent.mkdir(exist_ok=True)
                        with log_of(rank).open("ab") as log:
                            processes.append(subprocess.Popen(command, stdout=log, stderr=log, **settings))
                    else:
                        processes.append(subprocess.Popen(command, **settings))
                first = wait(processes, asked)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        if first is not None:
            raise failure(first, processes, log_of, Path(folder), asked, advice)


def meeting_point() -> tuple[Any, dict[str, str]]:
    """Where ranks of this machine find each other: a store, to be held as long as they run, and their variables."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    return store, place | {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # it is here, and not rank 0's to make


@contextmanager
def passed_on(ranks: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Pass the signals that this process gets on to the ranks, which know what to do; yields those there were."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        for process in ranks:
            process.send_signal(number)

    before = {number: signal.getsignal(number) for number in HEEDED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it: ranks inherit that
            signal.signal(number, pass_on)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def wait(ranks: list[subprocess.Popen], asked: list[int]) -> int | None:
    """Until all ranks have ended. The first that failed, or None; the others get a few seconds after it.

    So do all after a signal that came twice: a rank may stand still.
    """
    first, failed_at, twice_at = None, 0.0, 0.0
    while True:
        if len(set(asked)) < len(asked) and "SLURM_JOB_ID" not in os.environ:
            twice_at = twice_at or time.monotonic()
            if time.monotonic() - twice_at > GRACE:
                raise Stopped(asked[-1])
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and first is None:
            # One that was killed did not fail because another did.
            first = min(failed, key=lambda rank: (codes[rank] or 0, rank))
            failed_at = time.monotonic()
        if None not in codes:
            return first
        # After a stop, rank 0 may have more to end than the others: W&B sends what it has.
        grace = PATIENCE if first is not None and stopped(codes[first]) else GRACE
        if first is not None and time.monotonic() - failed_at > grace:
            return first
        time.sleep(0.1)


def stopped(code: int | None) -> bool:
    """Whether an exit code is that of `Stopped`."""
    return code is not None and code - 128 in HEEDED


def failure(
    first: int,
    ranks: list[subprocess.Popen],
    log_of: Callable[[int], Path],
    folder: Path,
    asked: list[int],
    advice: str,
) -> BaseException:
    """What to raise for ranks that failed, with their reports in a folder, after the signals that were passed on."""
    reports = {}
    for rank in range(len(ranks)):
        if (folder / str(rank)).is_file():
            reports[rank] = json.loads((folder / str(rank)).read_text())
    code = ranks[first].returncode
    if stopped(code):
        return Stopped(code - 128)
    if asked and not reports:  # they were still importing
        return Stopped(asked[0])
    if code > 0 and reports:  # the first to fail, as their own clocks say
        first = min(reports, key=lambda rank: reports[rank]["time"])
        code = ranks[first].returncode
    report = reports.get(first)
    if report and report["plainly"]:
        return UserError(report["text"], report["cause"])
    what = ""
    if report:
        print(report["text"], file=sys.stderr)
        what = f" ({report['text'].splitlines()[-1]})"
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}{what}"
    log = f" Its log: {log_of(first)}" if first else ""
    others = ", and the other ranks were stopped" if len(ranks) > 1 else ""
    why = " The system does that when memory runs out." if code == -signal.SIGKILL else ""
    who = f"rank {first}" if len(ranks) > 1 else "its process"
    text = f"{who} {ended}{others}.{why}{log}{advice}"
    return UserError(text, "killed" if code < 0 else "crashed")


def report(text: str, error: BaseException, plainly: bool) -> bool:
    """Leave an error of this rank to the process that started it, which shows it; False if that was another's."""
    place = os.environ.get("LMLAB_REPORT")
    if place is None:
        return False
    Path(place).write_text(
        json.dumps({"text": text, "plainly": plainly, "cause": cause_of(error), "time": time.time()})
    )
    return True


def end_with_parent() -> None:
    """Let the system kill this process when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, of Linux
    if os.getppid() != int(os.environ["LMLAB_PARENT"]):  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def traced(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()
