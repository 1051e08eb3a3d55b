"""The ranks of a run that torchrun or srun started: which this process is, and what rank 0 tells the others.

Nothing heavy is imported at the top: each command asks first who started it.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmlab.distributed.signals import BEFORE_THE_LIMIT
from lmlab.errors import UserError

RUN_DIR = "lmlab/run_dir"  # key of the store
# DDP warns of what config/build.py asks of it on purpose. Read when torch is imported.
LOG_LEVEL = ("TORCH_CPP_LOG_LEVEL", "ERROR")


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
