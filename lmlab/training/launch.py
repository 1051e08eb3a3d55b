"""The ranks of a run: started here, or by torchrun or srun.

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmlab import shell
from lmlab.errors import Stopped, UserError, cause_of
from lmlab.runs.directory import RunDirectory
from lmlab.runs.stopping import BEFORE_THE_LIMIT, HEEDED

GRACE = 3.0  # seconds that ranks get to end by themselves after one has failed
PATIENCE = 300.0  # and after one has stopped for a signal
# DDP warns of what config/build.py asks of it on purpose. Read when torch is imported.
LOG_LEVEL = ("TORCH_CPP_LOG_LEVEL", "ERROR")
WORD = "lmlab/word"  # of the store: what rank 0 says


def launch(verb: str, run: RunDirectory, devices: int, word: list[str]) -> None:
    """Run `python -m lmlab.worker VERB …` once per device, with `word` after the verb, and wait for all.

    The terminal is rank 0's; what the others print goes to `logs/` of the run directory.

    Raises:
        UserError: a rank failed; the others were ended.
        Stopped: the ranks ended for a signal.
    """
    _held, meeting = meeting_point()
    run.logs.mkdir(exist_ok=True)
    common = os.environ | meeting
    common |= {"WORLD_SIZE": str(devices), "LOCAL_WORLD_SIZE": str(devices), "GROUP_RANK": "0"}
    common["LMLAB_PARENT"] = str(os.getpid())
    common.setdefault(*LOG_LEVEL)
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    command = [sys.executable, "-u", "-m", "lmlab.worker", verb, *word]
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[subprocess.Popen] = []
        with passed_on(ranks) as asked:
            try:
                for rank in range(devices):
                    env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LMLAB_REPORT": f"{folder}/{rank}"}
                    # Its own session: a Ctrl-C reaches the ranks once, from here.
                    settings: dict[str, Any] = {"env": env, "stdin": subprocess.DEVNULL, "start_new_session": True}
                    if rank:
                        with run.rank_log(rank).open("ab") as log:
                            ranks.append(subprocess.Popen(command, stdout=log, stderr=log, **settings))
                    else:
                        ranks.append(subprocess.Popen(command, **settings))
                first = wait(ranks, asked)
            finally:
                for process in ranks:
                    process.kill()
                    process.wait()
        if first is not None:
            raise failure(verb, first, ranks, run, Path(folder), asked)


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
    verb: str, first: int, ranks: list[subprocess.Popen], run: RunDirectory, folder: Path, asked: list[int]
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
    log = f" Its log: {run.rank_log(first)}" if first else ""
    hint = f"\nThe run can go on from its last state: {shell.command('python', '-m', 'lmlab.resume', run.path)}"
    others = ", and the other ranks were stopped" if len(ranks) > 1 else ""
    why = " The system does that when memory runs out." if code == -signal.SIGKILL else ""
    who = f"rank {first}" if len(ranks) > 1 else "its process"
    text = f"{who} {ended}{others}.{why}{log}{hint if verb == 'train' else ''}"
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


def rank() -> int | None:
    """Which of several ranks this process is, where torchrun or srun started them; None where nobody did.

    From then on the variables of torchrun are set, whoever it was.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        tasks, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_STEP_NUM_NODES"])
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], str(tasks)
        env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = env["SLURM_LOCALID"], str(tasks // nodes)
        env["GROUP_RANK"] = env["SLURM_NODEID"]
        # A node's own name, and a port that two steps hardly share.
        env["MASTER_ADDR"] = SLURMEnvironment.resolve_root_node_address(env["SLURM_STEP_NODELIST"])
        env["MASTER_PORT"] = str(12000 + (31 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 20000)
    if int(env.get("WORLD_SIZE", 1)) == 1 or not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= env.keys():
        return None
    env.setdefault(*LOG_LEVEL)
    return int(env["RANK"])


def width() -> tuple[int, int]:
    """Ranks per node, and nodes, that were started."""
    ranks = int(os.environ["WORLD_SIZE"])
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return per_node, ranks // per_node


def store() -> Any:
    """What the ranks of another's start share: kept by rank 0, or by torchrun's agent."""
    global _store
    if _store is None:
        from datetime import timedelta

        from torch.distributed import TCPStore

        mine = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        _store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=mine,
            wait_for_workers=False,
            timeout=timedelta(days=2),  # a large corpus is tokenized meanwhile
            multi_tenant=True,  # the process group will use it too
        )
    return _store


_store: Any = None


@contextmanager
def leading() -> Iterator[None]:
    """What rank 0 does before it has told the others: if it fails, they end too."""
    if rank() is None:
        yield
        return
    store()
    try:
        yield
    except BaseException:
        tell(None)
        raise


def tell(word: list[str] | None) -> None:
    """Tell the other ranks the arguments of their share; [] if there is nothing to do, None if that is an error."""
    if rank() is None or store().check([WORD]):
        return
    store().set(WORD, json.dumps(word))
    if not word:  # the store may end with this process
        others, patience = int(os.environ["WORLD_SIZE"]) - 1, time.monotonic() + 30
        while store().add(f"{WORD}/heard", 0) < others and time.monotonic() < patience:
            time.sleep(0.05)


def hear() -> list[str] | None:
    """What rank 0 tells; None if it ended without a word."""
    for number in BEFORE_THE_LIMIT:  # for rank 0 to heed; here it would end the process, and with it the job
        signal.signal(number, signal.SIG_IGN)
    from torch.distributed import DistError

    try:
        store().wait([WORD])
        word = json.loads(store().get(WORD))
        store().add(f"{WORD}/heard", 1)
    except DistError:
        return None
    return word


def traced(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()
