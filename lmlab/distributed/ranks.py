"""The ranks of a run that torchrun, srun or lmlab started: which one this process is, and what they tell each other.

Before a process group exists, ranks talk through a store, torch's `TCPStore`. Nothing heavy is imported at the top:
every command asks first which rank it is.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from lmlab.distributed import slurm
from lmlab.distributed.signals import BEFORE_THE_LIMIT
from lmlab.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# DDP warns of what config/build.py asks of it on purpose. Read when torch is imported.
LOG_LEVEL = ("TORCH_CPP_LOG_LEVEL", "ERROR")
STORE_TIMEOUT = 2 * 24 * 60 * 60  # seconds; a large corpus is tokenized meanwhile
FREED_WITHIN = 0.5  # seconds in which threads of gloo have freed their last tensors
WAIT_FOR_RECEIVERS = 30.0  # seconds that rank 0 waits for the others before it ends, and the store with it


class Key(StrEnum):
    """The keys under which ranks leave values in the store."""

    RUN_DIR = "lmlab/run_dir"  # the run directory of torchrun's first attempt
    PORT = "lmlab/port"  # where the store of an attempt listens, by its number
    ARGUMENTS = "lmlab/arguments"  # what the other ranks have to do
    RECEIVED = "lmlab/received"  # how many of them know
    FACTS = "lmlab/facts"  # what each rank holds, by its number
    SHARED = "lmlab/shared"  # what rank 0 tells the others, by a name


def rank() -> int | None:
    """Returns the rank of this process, or None if it is the only one.

    Afterwards the variables of torchrun are set, whether torchrun, srun or lmlab started the ranks.
    """
    slurm.set_rank_variables()
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) == 1 or not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= env.keys():
        return None
    env.setdefault(*LOG_LEVEL)
    return int(env["RANK"])


def world_size() -> int:
    """Returns how many ranks there are, on all nodes."""
    return int(os.environ["WORLD_SIZE"])


def width() -> tuple[int, int]:
    """Returns how many ranks each node has, and how many nodes there are."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return per_node, world_size() // per_node


@cache
def store() -> "TCPStore":
    """Returns the store that all ranks share; torchrun's agent or lmlab's launcher keeps it, or else rank 0."""
    kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    shared = connect(int(os.environ["MASTER_PORT"]), keeps=os.environ["RANK"] == "0" and not kept_by_agent)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return store_of_attempt(shared, attempt) if attempt else shared


def connect(port: int, keeps: bool) -> "TCPStore":
    """Returns the store that listens on the first node; the process that `keeps` it makes it, at any port for 0."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        is_master=keeps,
        wait_for_workers=False,
        timeout=timedelta(seconds=STORE_TIMEOUT),
        multi_tenant=True,  # the process group will use it too
    )


def store_of_attempt(agent: "TCPStore", attempt: int) -> "TCPStore":
    """Returns a new store for an attempt after torchrun's first, which the process group will use too.

    The agent keeps its store when it starts all ranks again, with the values and addresses of the earlier ones.
    """
    key = f"{Key.PORT}/{attempt}"
    if os.environ["RANK"] == "0":
        new = connect(0, keeps=True)
        if agent.check([Key.RUN_DIR]):
            new.set(Key.RUN_DIR, agent.get(Key.RUN_DIR).decode())
        agent.set(key, str(new.port))
    else:
        new = connect(int(agent.get(key)), keeps=False)
    os.environ["MASTER_PORT"] = str(new.port)
    return new


def same_directory(run_dir: str) -> str:
    """Returns the run directory of torchrun's first attempt, in which later ones go on; `run_dir` in the first one."""
    return run_dir if rank() is None else store().compare_set(Key.RUN_DIR, "", run_dir).decode()


def check_ranks_agree(**facts: str) -> None:
    """Waits until every rank has come here, and refuses to go on unless all hold the same facts.

    The ranks meet over the store rather than in a collective: one of them may prepare its node's data for hours, and
    a process group would time out.

    Args:
        facts: hashes by the names of what they are of, such as `data`. The ranks meet once for the same names.

    Raises:
        UserError: in every rank; names the first rank that holds another fact than rank 0.
    """
    number = rank()
    if number is None:
        return
    from torch.distributed.elastic.utils.store import synchronize

    mine = json.dumps([socket.gethostname(), facts]).encode()
    everyone = synchronize(store(), mine, number, world_size(), f"{Key.FACTS}/{'/'.join(facts)}", STORE_TIMEOUT)
    (_, expected), *others = map(json.loads, everyone)
    for other, (host, found) in enumerate(others, 1):
        for name in facts:
            if found[name] != expected[name]:
                raise UserError(
                    f"rank {other} on {host} has another {name} than rank 0 "
                    f"({found[name][:12]}, not {expected[name][:12]}).\n"
                    "All nodes need the same files and versions."
                )


def from_rank_zero(name: str, make: Callable[[], str]) -> str:
    """Returns what `make` returns on rank 0; the other ranks wait for it.

    Raises:
        UserError: rank 0 has ended without it.
    """
    number, key = rank(), f"{Key.SHARED}/{name}"
    if not number:
        value = make()
        if number is not None:
            store().set(key, value)
        return value
    from torch.distributed import DistError

    try:
        while not store().check([key]):  # in a `get` that waits, no signal would end this process
            time.sleep(0.05)
        return store().get(key).decode()
    except DistError as error:  # the store has ended with it
        raise UserError("rank 0 has ended. Its message says why.") from error


@contextmanager
def leading() -> Iterator[None]:
    """Lets the other ranks end if rank 0 fails inside, before it has sent them their arguments."""
    if rank() is not None:
        store()  # the others wait for it
    try:
        yield
    except BaseException:
        send_arguments([])
        raise


@contextmanager
def groups_ended() -> Iterator[None]:
    """Destroys the process groups that were made inside, which Lightning leaves open.

    A thread of gloo frees the tensors of its last collective after that has ended. It needs Python's lock for this, and
    aborts the process if Python is being finalized by then (torch 2.13; under FSDP2 the threads outlive their group).
    """
    import torch.distributed as dist

    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(FREED_WITHIN)


def send_arguments(arguments: list[str], variables: dict[str, str] | None = None) -> None:
    """Sends the other ranks the arguments of their share of the work, once; none if they are to end.

    Args:
        arguments: the run directory, and the checkpoint to go on from if there is one.
        variables: added to the environment of each rank.
    """
    if rank() is None or store().check([Key.ARGUMENTS]):
        return
    store().set(Key.ARGUMENTS, json.dumps([arguments, variables or {}]))
    if not arguments:  # the store may end with this process
        until = time.monotonic() + WAIT_FOR_RECEIVERS
        while store().add(Key.RECEIVED, 0) < world_size() - 1 and time.monotonic() < until:
            time.sleep(0.05)


def receive_arguments() -> list[str]:
    """Waits for the arguments that rank 0 sends, and returns them; none if this rank is to end."""
    for number in BEFORE_THE_LIMIT:  # rank 0 acts on them; here they would end the process, and with it the job
        signal.signal(number, signal.SIG_IGN)
    from torch.distributed import DistError

    try:
        arguments, variables = json.loads(store().get(Key.ARGUMENTS))
        store().add(Key.RECEIVED, 1)
    except DistError:  # rank 0 has ended, and the store with it
        return []
    os.environ.update(variables)
    return arguments
