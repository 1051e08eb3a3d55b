"""What can be reached: the controller of a cluster, the hub, Weights & Biases.

The latter two are asked in processes, which can be ended: looking up a host's name knows no time limit.
"""

import os
import re
import shutil
import signal
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec

from lmlab.doctor.environment import REINSTALL, NotThere
from lmlab.errors import UserError
from lmlab.hub import go_offline_if_cut_off
from lmlab.processes import calling, ended, last_line


def slurm() -> str:
    """The controller of a SLURM cluster answers; its partitions, and what becomes of jobs that it stops."""
    if not shutil.which("sinfo"):
        raise NotThere("not a SLURM machine")
    said = []
    for partition in answer_of("sinfo", "--noheader", "--format=%P %F %l %a").splitlines():
        name, nodes, limit, state = partition.split()
        _, idle, _, total = nodes.split("/")
        hours = "no time limit" if limit == "infinite" else f"at most {limit}"
        said.append(f"{name} {total} nodes ({idle} idle), {hours}{'' if state == 'up' else f', {state}'}")
    config = dict(re.findall(r"^(\w+) *= *(\S+)", answer_of("scontrol", "show", "config"), re.MULTILINE))
    said.append("jobs are re-queued" + ("" if config.get("JobRequeue") == "1" else " with sbatch --requeue"))
    said.append(f"preemption {config.get('PreemptMode', 'unknown')}")
    try:
        said.append(f"hydra-submitit-launcher {metadata.version('hydra-submitit-launcher')}")
    except metadata.PackageNotFoundError:
        said.append("for -m hydra/launcher=slurm: pip install 'lmlab[slurm]'")
    return "; ".join(said)


def answer_of(*command: str) -> str:
    """Of a command of SLURM."""
    code, said = ended([*command], 10)
    if "configuration source" in said:
        raise NotThere("its commands are installed, and no cluster is configured: SLURM_CONF names one")
    if code:
        raise UserError(
            f"{command[0]}: {last_line(said).removeprefix(f'{command[0]}: ')}\n"
            "ask the cluster's admins; `scontrol ping` names the controller, SLURM_CONF the configuration"
        )
    return said


def hub() -> str:
    """The Hugging Face hub answers, as a run would ask it."""
    code, said = ended(calling(ask_hub), 15)
    if code not in (0, -signal.SIGKILL):
        raise UserError(f"huggingface_hub: {last_line(said)}\n{REINSTALL}")
    endpoint, what = last_line(said).split() if code == 0 else ("the hub", "silent")
    if what == "unasked":
        raise NotThere("HF_HUB_OFFLINE=1: only what is cached is used")
    if what == "silent":
        raise NotThere(f"{endpoint} does not answer: use local directories, or HF_HUB_OFFLINE=1 for what is cached")
    return f"{endpoint} answers"


def ask_hub() -> None:
    """Print the hub's address, and what came of asking it."""
    from huggingface_hub import constants

    told = constants.is_offline_mode()
    go_offline_if_cut_off()
    print(constants.ENDPOINT, "unasked" if told else "silent" if constants.is_offline_mode() else "answers")


def wandb() -> str:
    """Weights & Biases: a key that is configured is let in. It is never shown."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        raise NotThere(f"WANDB_MODE={mode}: nothing is sent")
    if find_spec("wandb") is None:
        raise UserError("wandb is not installed\npip install wandb, or logger=file for each run")
    code, said = ended(calling(ask_wandb), 25, WANDB_SILENT="true")
    answer = "no answer in 25 s" if code == -signal.SIGKILL else last_line(said)
    if code:
        raise UserError(f"{answer}\nset WANDB_MODE=offline, or WANDB_BASE_URL; for another key: python -m wandb login")
    if answer == "no key":
        raise NotThere("no key, so runs are logged offline; to send them: python -m wandb login")
    return f"{answer} accepts the key"


def ask_wandb() -> None:
    """Print the address that accepts the key, or what is wrong."""
    from urllib.error import HTTPError
    from urllib.request import urlopen

    import wandb

    code, said = 0, "its server"
    try:
        said = wandb.setup().settings.base_url
        if not wandb.login(prompt=False, verify=False):
            said = "no key"
        else:
            with suppress(HTTPError):  # first of all: its own client takes long to say that nobody answers
                urlopen(said, timeout=5).close()
            wandb.Api(timeout=10)
    except wandb.errors.Error as error:
        code, said = 1, str(error)
    except OSError as error:
        code, said = 1, f"{said} does not answer: {getattr(error, 'reason', error)}"
    print(said, flush=True)
    os._exit(code)  # its service may take minutes to end by itself
