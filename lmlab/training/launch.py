"""The ranks of a run: started here, or by torchrun or srun.

Lightning's own launcher replays the command line in its children, `--multirun` included. Here
one process composes the config (promise 5), and every other rank is told where it lies.

Nothing heavy is imported at the top: each verb asks first who started it.
"""

import ctypes
import json
import os
import signal
import socket
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
RUN_DIR = "lmlab/run_dir"  # of the store
PATIENCE = 300.0  # and after one has stopped for a signal
# DDP warns of what config/build.py asks of it on purpose. Read when torch is imported.
LOG_LEVEL = ("TORCH_CPP_LOG_LEVEL", "ERROR")


def launch(verb: str, run: RunDirectory, devices: int, word: list[str], variables: dict[str, str]) -> None:
    """Run `python -m lmlab.worker VERB …` once per device, with `word` after the verb, and wait for all.

    `variables` are added to the environment of each.

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
    common |= variables
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
    """The store that ranks which others started share: kept by rank 0, or by torchrun's agent."""
    global _store
    if _store is None:
        mine = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        _store = tcp_store(int(os.environ["MASTER_PORT"]), mine)
        if attempt := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            _store = renewed(_store, attempt)
    return _store


_store: Any = None


def tcp_store(port: int, mine: bool) -> Any:
    """The store at a port of the first node; `mine` makes it, at any free port for 0."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        is_master=mine,
        wait_for_workers=False,
        timeout=timedelta(days=2),  # a large corpus is tokenized meanwhile
        multi_tenant=True,  # the process group will use it too
    )


def renewed(agent: Any, attempt: int) -> Any:
    """A store of its own for each attempt after torchrun's first, also for the process group.

    The agent keeps its store when it starts all ranks again, with what the earlier ones said and where they listened.
    """
    name = f"lmlab/port/{attempt}"
    if os.environ["RANK"] == "0":
        fresh = tcp_store(0, True)
        if agent.check([RUN_DIR]):
            fresh.set(RUN_DIR, agent.get(RUN_DIR))
        agent.set(name, str(fresh.port))
    else:
        agent.wait([name])
        fresh = tcp_store(int(agent.get(name)), False)
    os.environ["MASTER_PORT"] = str(fresh.port)
    return fresh


def same_directory(run_dir: str) -> str:
    """The run directory of torchrun's first attempt, which those after it go on with; `run_dir` in the first one."""
    if rank() is None:
        return run_dir
    if not store().check([RUN_DIR]):
        store().set(RUN_DIR, run_dir)
    return store().get(RUN_DIR).decode()


def agree(**facts: str) -> None:
    """Wait until every rank has come here, and refuse to go on unless all hold the same facts.

    The ranks meet over the store rather than in a collective: one of them may prepare its node's data for
    hours, and a process group would give up on it.

    Args:
        facts: hashes, by what they are of; those of rank 0 count.

    Raises:
        UserError: in every rank, names one that differs and in what.
    """
    if rank() is None:
        return
    if rank() == 0:
        store().set("lmlab/facts", json.dumps(facts))
    store().wait(["lmlab/facts"])
    expected = json.loads(store().get("lmlab/facts"))
    wrong = [name for name in facts if facts[name] != expected[name]]
    if wrong:
        store().set(
            "lmlab/wrong",
            f"rank {rank()} on {socket.gethostname()} has another {wrong[0]} than rank 0 "
            f"({facts[wrong[0]][:12]}, not {expected[wrong[0]][:12]}).\nAll nodes need the same files and versions.",
        )
    if store().add("lmlab/compared", 1) == int(os.environ["WORLD_SIZE"]):
        store().set("lmlab/all", "")
    store().wait(["lmlab/all"])
    if store().check(["lmlab/wrong"]):
        raise UserError(store().get("lmlab/wrong").decode())


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


def tell(word: list[str] | None, variables: dict[str, str] | None = None) -> None:
    """Tell the other ranks the arguments of their share; [] if there is nothing to do, None if that is an error.

    `variables` are added to the environment of each.
    """
    if rank() is None or store().check(["lmlab/word"]):
        return
    store().set("lmlab/word", json.dumps([word, variables or {}]))
    if not word:  # the store may end with this process
        others, patience = int(os.environ["WORLD_SIZE"]) - 1, time.monotonic() + 30
        while store().add("lmlab/heard", 0) < others and time.monotonic() < patience:
            time.sleep(0.05)


def hear() -> list[str] | None:
    """What rank 0 tells; None if it ended without a word."""
    for number in BEFORE_THE_LIMIT:  # for rank 0 to heed; here it would end the process, and with it the job
        signal.signal(number, signal.SIG_IGN)
    from torch.distributed import DistError

    try:
        store().wait(["lmlab/word"])
        word, variables = json.loads(store().get("lmlab/word"))
        store().add("lmlab/heard", 1)
    except DistError:
        return None
    os.environ.update(variables)
    return word


def traced(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()
