"""Pushes a finished run to the Hugging Face hub: its weights, its card, and files of its run directory.

A push can be repeated: the client sends nothing that the hub has already, and makes a commit only if a file differs.
The file `run/manifest.json` in the repository names the run that it holds.

    main      the exported model, README.md, curve.png, files of the run directory under run/, and the adapter of
              a run with one under adapter/
    step-N    a tag for each step of the series: the exported model after that step
    series    the branch that these tags are on
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_session,
    get_token,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from lmlab.console import command
from lmlab.errors import UserError, first_line
from lmlab.hub import retry
from lmlab.io import from_here, read_json
from lmlab.runs.directory import RunDirectory
from lmlab.runs.status import ENDED, read_status
from lmlab.sharing.requests import errors_explained
from lmlab.sweeps.points import SWEEP_FILE

MANIFEST = "run/manifest.json"
"""The file of a repository that names its run."""
STALE = ("*.safetensors", "*.safetensors.index.json", "adapter/*", "run/*")
"""Patterns of the files that a push removes from `main` if the run no longer has them. Others may be somebody's own."""
WEIGHTS = (".safetensors", ".bin", ".gguf", ".onnx", ".pt")
SERIES = "series"


@dataclass(frozen=True)
class Destination:
    """The repository of a push, and what is chosen for it."""

    repository: str
    """Its id, such as me/my-model."""
    license: str | None
    """The licence of the model, as the hub names it: apache-2.0, mit, cc-by-4.0, other."""
    private: bool = False
    """Make it a repository that only its owner sees."""
    series: bool = False
    """Push the series of models too."""


def push(run: RunDirectory, destination: Destination) -> str:
    """Pushes a finished run, and returns what was done, in words.

    Raises:
        UserError: the run or the hub does not allow it. What was sent is not sent again by the next push.
    """
    check_choices(destination)
    check_finished(run, destination)
    run_id = run.read_manifest()["run_id"]
    with errors_explained(destination.repository):
        found = find_repository(destination, run_id)
        files, series = contents(run, destination)
        tags = send(destination, run_id, files, series)
        now = retry(lambda: HfApi().model_info(destination.repository).sha)
    url = f"{constants.ENDPOINT}/{destination.repository}"
    if not tags and found is not None and found.sha == now:
        return f"{url} has all of run {run_id} already: nothing was sent."
    sent = f", {', '.join(tags)}" if tags else ""
    return f"Pushed run {run_id} to {url}: main at {now[:12] if now else '?'}{sent}."


def check_before_training(run: RunDirectory, destination: Destination) -> None:
    """Refuses a push that could not be made at the end of a run.

    The hub is asked only for a new run: one that is resumed goes on while the hub can't be reached.
    """
    check_choices(destination)
    if not run.begun():
        with errors_explained(destination.repository):
            find_repository(destination, None)


def check_choices(destination: Destination) -> None:
    """Refuses a push without a name, a licence, a token or a network, as far as this machine can tell.

    Raises:
        UserError: says what is missing.
    """
    repository = destination.repository
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f'"{repository}" can\'t be a repository of the hub: {first_line(error)}') from error
    if repository.count("/") != 1:
        raise UserError(f'"{repository}" names no owner: write OWNER/NAME, such as me/my-model.')
    if not (destination.license or "").strip():
        raise UserError(
            f"{repository} needs a licence, which says what others may do with the model.\n"
            "Add --license apache-2.0 (logger.push_license=apache-2.0 for a run), or mit, cc-by-4.0, other, …"
        )
    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, and a push needs the hub: unset it.")
    if not get_token():
        raise UserError(
            "there is no token of the hub: log in by hf auth login, or set HF_TOKEN.\n"
            f"A token that may write is made at {constants.ENDPOINT}/settings/tokens."
        )


def check_finished(run: RunDirectory, destination: Destination) -> None:
    """Refuses what is no finished run with an exported model, and says which weights a run has.

    Raises:
        UserError: says what to do instead.
    """
    path = from_here(run.path)
    if (run.path / SWEEP_FILE).is_file():
        raise UserError(f"{path} is a sweep: name one of its runs.")
    if not run.has_config():
        raise UserError(f"{path} is no run: there is no manifest.json with a config.yaml in it.\nName a run directory.")
    status = read_status(run)
    if status.name not in ENDED:
        if not run.ledger.is_file():
            raise UserError(f"{path} is an evaluation, or a run that has not begun to train. Name a finished run.")
        files = {"its best weights, of": run.best_files(), "a checkpoint of": run.checkpoint_files()[-1:]}
        steps = {what: " and ".join(str(run.step_of(one)) for one in found) for what, found in files.items() if found}
        kept = " and ".join(f"{what} step {step}" for what, step in steps.items()) or "no weights yet"
        of_all = f"step {status.step}" + (f" of {status.steps}" if status.steps else "")
        became = {"running": "is going on, at", "stopped": "was stopped at"}.get(status.name, f"{status.name} at")
        advice = "Wait for its end" if status.name == "running" else command("python", "-m", "lmlab.resume", path)
        raise UserError(
            f"{path} {became} {of_all}{f' ({status.cause})' if status.cause else ''}.\n"
            f"It has {kept}; a model to push is exported at its end.\n"
            f"To finish it first: {advice}"
        )
    if not (run.model / "config.json").is_file():
        raise UserError(f"{path} has no exported model any more: {run.model.name} is gone. Bring it back.")
    if destination.series and not series_steps(run):
        raise UserError(f"{path} has no series of models. Leave out --series.")


def series_steps(run: RunDirectory) -> dict[int, Path]:
    """Returns the exported models of the series of a run by their steps, first to last; none if it keeps no series."""
    return {model["step"]: run.series / model["path"] for model in run.read_series()}


def find_repository(destination: Destination, run_id: str | None) -> ModelInfo | None:
    """Returns what the hub knows of the repository; None if there is none yet.

    Args:
        run_id: the run that is to be pushed; None for one that has not begun.

    Raises:
        UserError: the token may not write, or the repository holds something else.
    """
    api, repository = HfApi(), destination.repository
    get_session().head(constants.ENDPOINT, timeout=10)  # the client itself would wait for ever
    user = retry(api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            "the token of the hub may only read.\n"
            f"Make one that may write at {constants.ENDPOINT}/settings/tokens, and log in by hf auth login."
        )
    owners = [user["name"], *(one["name"] for one in user.get("orgs", ()))]
    if repository.partition("/")[0] not in owners:
        raise UserError(f"the token is of {user['name']}, who may not write to {repository}.\nYours: {owners[0]}/NAME")
    check_license(destination)
    try:
        info = retry(lambda: api.model_info(repository))
    except RepositoryNotFoundError:
        return None
    if destination.private and not info.private:
        raise UserError(f"{repository} is public already. Make it private in its settings, or push without --private.")
    files = [sibling.rfilename for sibling in info.siblings or ()]
    if MANIFEST in files:
        with TemporaryDirectory() as folder:
            manifest = retry(lambda: api.hf_hub_download(repository, MANIFEST, cache_dir=folder))
            held = read_json(Path(manifest)).get("run_id")
        if held != run_id:
            raise UserError(f"{repository} holds another run, {held}.\nPush to a repository of its own: {repository}-2")
    elif any(name.endswith(WEIGHTS) for name in files):
        raise UserError(f"{repository} holds a model that is no run of lmlab's.\nPush to a repository of its own.")
    return info


def check_license(destination: Destination) -> None:
    """Refuses a licence that the hub does not know, before any weights are sent.

    Raises:
        UserError: with the answer of the hub.
    """
    try:
        retry(ModelCard(f"---\nlicense: {destination.license}\n---\n").validate)
    except ValueError as error:
        why = shorten(" ".join(re.findall(r'"message":\s*"((?:\\.|[^"\\])*)"', str(error))), 300, placeholder=" …")
        raise UserError(
            f"the hub does not take the licence {destination.license}: {why.replace(chr(92), '')}\n"
            "Take one that it lists, or other."
        ) from error


Contents = Mapping[str, Path | bytes]
"""Files by their paths in a repository: the path of each on the disk, or its content."""


def contents(run: RunDirectory, destination: Destination) -> tuple[Contents, dict[int, Contents]]:
    """Returns the files of `main`, and those of each step of the series."""
    from lmlab.sharing.card import build_card, build_step_card

    repository, license = destination.repository, destination.license or ""
    steps = series_steps(run) if destination.series else {}
    kept = (
        *(run.config, run.overrides, run.manifest, run.ledger, run.certificate, run.records, run.summary, run.metrics),
        run.series_index,
    )
    files: dict[str, Path | bytes] = {
        f"run/{file.relative_to(run.path).as_posix()}": file for file in kept if file.is_file()
    }
    files |= {f"{run.adapter.name}/{name}": file for name, file in files_in(run.adapter).items()}
    files |= files_in(run.model) | build_card(run, repository, license, list(steps))
    series: dict[int, Contents] = {
        step: {**files_in(folder), "README.md": build_step_card(run, repository, license, step)}
        for step, folder in steps.items()
    }
    return files, series


def files_in(folder: Path) -> dict[str, Path | bytes]:
    """Returns the files in a folder by their paths in it."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def send(destination: Destination, run_id: str, files: Contents, series: Mapping[int, Contents]) -> list[str]:
    """Makes the repository where there is none, and commits these files; returns the tags that were made.

    `main` goes first, as its manifest names the run that the repository holds.
    """
    api, repository = HfApi(), destination.repository
    private = True if destination.private else None
    retry(lambda: api.create_repo(repository, private=private, exist_ok=True))
    retry(lambda: commit(api, repository, "main", files, f"Run {run_id}", STALE))
    made = []
    for step, model in series.items():
        if retry(partial(push_step, api, repository, f"step-{step}", model)):
            made.append(f"step-{step}")
    return made


def push_step(api: HfApi, repository: str, tag: str, files: Contents) -> bool:
    """Commits the model of a step to the branch of the series, and tags it; returns False if it was there already.

    The tag is made last: an interrupted push leaves commits without a tag, and never half of a tagged model.
    """
    refs = api.list_repo_refs(repository)
    tagged = tag in [ref.name for ref in refs.tags]
    if tagged and is_same(api, repository, tag, files):
        return False
    if SERIES not in [ref.name for ref in refs.branches]:
        api.create_branch(repository, branch=SERIES, exist_ok=True)
    made = commit(api, repository, SERIES, files, f"Model after {tag}", ("*",))
    if tagged:
        api.delete_tag(repository, tag=tag)
    api.create_tag(repository, tag=tag, revision=made, exist_ok=True)
    return True


def commit(api: HfApi, repository: str, branch: str, files: Contents, message: str, stale: tuple[str, ...]) -> str:
    """Makes a branch hold these files, by one commit, or by none where nothing differs.

    Args:
        stale: patterns of other files, which are removed.

    Returns:
        the commit that the branch is at.
    """
    there = {entry.path for entry in list_files(api, repository, branch)} - {".gitattributes"}
    gone = sorted(path for path in there - files.keys() if any(fnmatch(path, pattern) for pattern in stale))
    operations: list[Any] = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
    operations += [CommitOperationDelete(path) for path in gone]
    return api.create_commit(repository, operations, commit_message=message, revision=branch).oid


def list_files(api: HfApi, repository: str, revision: str) -> list[RepoFile]:
    """Returns the files of a revision."""
    tree = api.list_repo_tree(repository, revision=revision, recursive=True)
    return [entry for entry in tree if isinstance(entry, RepoFile)]


def is_same(api: HfApi, repository: str, revision: str, files: Contents) -> bool:
    """Returns whether a revision holds just these files."""
    there = {entry.path: entry for entry in list_files(api, repository, revision) if entry.path != ".gitattributes"}
    return there.keys() == files.keys() and all(has_content(files[path], there[path]) for path in there)


def has_content(content: Path | bytes, entry: RepoFile) -> bool:
    """Returns whether a file of the hub has this content, by its hash."""
    if entry.lfs is None:
        return git_hash(content if isinstance(content, bytes) else content.read_bytes()) == entry.blob_id
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest() == entry.lfs.sha256
    with content.open("rb") as file:
        return sha_fileobj(file).hex() == entry.lfs.sha256
