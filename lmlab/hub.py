"""Loads from the Hugging Face hub: what a failed one means, which requests are repeated, and when none is made."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

from lmlab.errors import UNWRITABLE, UserError, causes, first_line, out_of_memory

LOG = logging.getLogger(__name__)
T = TypeVar("T")
TRIES = 4
"""The attempts at a request that fails for now."""
ADAPTER = "adapter_config.json"
"""The config of an adapter in the form of peft, beside its weights."""


def check_directory(kind: str, name: str, key: str) -> None:
    """Refuses the path of a directory, or of a `.gguf` file, that does not exist.

    A name that can be that of a hub repository, such as `gpt2` or `org/model`, is accepted.

    Args:
        kind, name, key: as for `from_hub`.
    """
    repository, _ = split_revision(name)
    local = name.startswith(("/", ".", "~")) or repository.count("/") > 1 or is_gguf(name)
    if local and not Path(name).exists():
        missing = "file" if is_gguf(name) else "directory"
        raise UserError(f'could not load {kind} "{name}": no such {missing}. Give one that is there as {key}.')


def is_gguf(name: str) -> bool:
    """Returns whether a name is that of a file in GGUF, the format of llama.cpp."""
    return name.endswith(".gguf") and not Path(name).is_dir()


def is_adapter(name: str) -> bool:
    """Returns whether a name is that of a directory with an adapter in the form of peft."""
    return Path(name, ADAPTER).is_file()


def split_revision(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Splits the name of a model, such as `me/my-model@step-1000`, into its hub id and its revision.

    Args:
        name: hub id, with a branch, tag or commit behind an @ or without; or directory, which stays as it is.
        revision: the revision that a key of its own gives, if any.

    Raises:
        UserError: there is nothing on one side of the @, or the two revisions differ.
    """
    repository, at, own = name.partition("@")
    if not at or Path(name).exists() or name.startswith(("/", ".", "~")):
        return name, revision
    if not repository or not own:
        raise UserError(f'"{name}" is no model: write ID, or ID@REVISION such as me/my-model@step-1000.')
    if revision not in (None, own):
        raise UserError(f'"{name}" and the revision "{revision}" contradict each other: give one of them.')
    return repository, own


@contextmanager
def from_hub(kind: str, name: str, key: str) -> Iterator[None]:
    """Turns a failed load inside into a `UserError` that says what was asked for, and how to go on without the network.

    Args:
        kind: what is loaded: model, tokenizer or data set.
        name: its hub id or directory.
        key: the config key that can name a local copy instead.
    """
    check_directory(kind, name, key)
    what = f'{kind} "{name}"'
    # Here, so that `--help` need not wait for them. The HTTP library's errors are no OSError.
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError

    was_offline = constants.HF_HUB_OFFLINE
    if not Path(name).exists():
        go_offline_if_cut_off()
    # Narrow on purpose: a defect raises something else and keeps its traceback.
    # huggingface_hub errors are OSError or ValueError, as are those of transformers and datasets.
    # What reads a damaged .gguf may raise anything.
    known = (Exception,) if is_gguf(name) else (OSError, ValueError, HTTPError, SafetensorError)
    try:
        yield
    except known as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what} would have to run code that comes with it, which lmlab does not do.\n"
                "Choose one of an architecture that transformers itself has."
            ) from error
        if Path(name).exists():
            exported = Path(name) / "model"
            hint = f'Did you mean "{exported}"?' if (exported / "config.json").is_file() else f"Give another as {key}."
            why = shorten(str(error), 300, placeholder=" …")
            if is_gguf(name):
                why = f"it is damaged, or holds what transformers does not read ({why})."
            raise UserError(f"could not load {what} from there: {why}\n{hint}") from error
        if was_offline:
            source = "the cache of the hub"
            advice = f"Give a local directory as {key}, or unset HF_HUB_OFFLINE to load it from the hub."
        else:
            source = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            advice = (
                f"Without a network, give a local directory as {key}, "
                "or set HF_HUB_OFFLINE=1 to use what is cached already."
            )
        raise UserError(
            f"could not load {what} (as a local directory, or from {source}): {first_line(error)}\n{advice}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def go_offline_if_cut_off() -> None:
    """Lets only the cache be used if the hub does not answer, which its clients would ask for minutes, file by file."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    silence_http()
    if not constants.is_offline_mode():
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except HTTPError:
            constants.HF_HUB_OFFLINE = True


def silence_http() -> None:
    """Hides what the HTTP library logs of each request, at the level of a run's own news."""
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)


def connection_errors() -> tuple[type[Exception], ...]:
    """Returns the errors of a connection that fails: of the HTTP library, and of hf_xet, which sends large files."""
    from huggingface_hub.errors import HTTPError

    return HTTPError, ConnectionError, TimeoutError


def retry(call: Callable[[], T]) -> T:
    """Calls a function that asks the hub, again where the connection or the hub fails for now.

    The function looks at what the hub has, so that a change whose answer was lost is not made twice.
    """
    for left in range(TRIES, 0, -1):
        try:
            return call()
        except Exception as error:
            wait = seconds_to_wait(error, TRIES - left)
            if wait is None or left == 1:
                raise
            LOG.debug("asking the hub again in %s seconds", wait, exc_info=True)
            time.sleep(wait)
    raise AssertionError


def seconds_to_wait(error: BaseException, tried: int) -> float | None:
    """Returns how long to wait before another attempt; None if it would end as this one did."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in causes(error):
        if isinstance(cause, UserError):
            return None
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status == 429:
                return retry_after(cause.response) or 2.0**tried
            return 2.0**tried if status >= 500 else None
        if isinstance(cause, connection_errors()):
            return 2.0**tried
    return None


def retry_after(response: Any) -> float | None:
    """Returns the seconds that the hub asks to wait before the next request; None if it does not say."""
    asked = response.headers.get("Retry-After", "").strip()
    return float(asked) if asked.isdecimal() else None
