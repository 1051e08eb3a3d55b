"""Requests of a push to the Hugging Face hub, and what their errors mean to a person."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError

from lmlab.errors import UserError, causes, first_line
from lmlab.hub import connection_errors, retry_after, silence_http

PATIENCE = 300
"""The seconds that the hub may ask to wait before the next request."""


@contextmanager
def errors_explained(repository: str) -> Iterator[None]:
    """Turns what goes wrong with the hub inside into a `UserError`, and hides what its client says besides.

    Raises:
        UserError: says what the hub answered, and what to do.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    as_set = sys.stderr.isatty() or are_progress_bars_disabled()
    if not as_set:
        disable_progress_bars()
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it tells of each attempt; `tell_to_wait` says what is of use
    silence_http()
    hooks = get_session().event_hooks
    get_session().event_hooks = hooks | {"response": [*hooks.get("response", ()), tell_to_wait]}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # the records
            yield
    except Exception as error:
        message = explain(error, repository)
        if message is None:
            raise
        raise UserError(message) from error
    finally:
        hub_logging.set_verbosity(verbosity)
        if not as_set:
            enable_progress_bars()
        get_session().event_hooks = hooks


def tell_to_wait(response: Any) -> None:
    """Says that the hub asks to wait, which its client then does.

    Raises:
        UserError: the hub asks for more than `PATIENCE`.
    """
    wait = retry_after(response) if response.status_code == 429 else None
    if wait is not None and wait > PATIENCE:
        raise UserError(
            f"the hub takes no more requests for {wait:.0f} seconds (429).\n"
            "Push again after that: what was sent is not sent again."
        )
    if wait is not None:
        print(f"The hub asks to wait {wait:.0f} seconds (429).", file=sys.stderr)


def explain(error: BaseException, repository: str) -> str | None:
    """Returns the message for an error of a push; None for a defect of lmlab."""
    again = "Push again: what was sent is not sent again."
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    for cause in causes(error):
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status == 401:
                return f"the hub does not know the token (401).\nMake one at {tokens}, and log in by hf auth login."
            if status == 403:
                return (
                    f"the token may not write to {repository} (403).\n"
                    f"Push to a repository of your own, or make a token that may at {tokens}."
                )
            if status == 429:
                return f"the hub takes no more requests for now (429).\n{again}"
            if status >= 500:
                return f"the hub failed ({status}).\n{again}"
            return f"the hub refused the push ({status}): {cause.server_message or first_line(cause)}"
        if isinstance(cause, connection_errors()):
            return f"{constants.ENDPOINT} does not answer, or the connection to it broke: {first_line(cause)}\n{again}"
    return None
