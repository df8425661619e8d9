"""What can go wrong between here and the Hub: what is tried again, and what is said of the rest.

Errors of the Hub's client become one line that says what would help. A server may repeat in its answer what it was
asked with, so the token is struck out of every message, and an error that held it is not shown as a cause.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.utils import logging


logger = logging.get_logger(__name__)

T = TypeVar("T")

# Seconds between one attempt and the next. A large file's upload is tried again by the client, too.
WAITS = (1, 2, 4, 8)
# Time-outs, another commit in between (which the next attempt builds upon), too many requests, a server in trouble.
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
# RuntimeError is what Xet's client raises, whatever went wrong; JSONDecodeError, what a proxy's page in place of the
# Hub's answer ends in.
NETWORK = (HTTPError, ConnectionError, TimeoutError, RuntimeError, json.JSONDecodeError)
FAILURES = (HTTPError, OSError, RuntimeError, ValueError)


def retried(attempt: Callable[[], T], repo_id: str, token: str) -> T:
    """What an attempt returns, of at most `len(WAITS) + 1`, which do all of it again.

    Raises:
        ValueError: the Hub refuses.
        ConnectionError: it could not be reached, time and again.
    """
    for wait in WAITS:
        try:
            return attempt()
        except FAILURES as error:
            if not is_passing(error):
                raise_told(error, repo_id, token)
            logger.warning(f"{repo_id}: {told(error, token)}; trying again in {wait} s")
        time.sleep(wait)
    try:
        return attempt()
    except FAILURES as error:
        raise_told(error, repo_id, token)


def is_passing(error: Exception) -> bool:
    """Whether the same may go well in a while."""
    status = status_of(error)
    if status is not None:
        return status in PASSING
    return any(isinstance(cause, NETWORK) for cause in causes(error))


def status_of(error: Exception) -> int | None:
    """Of the answer that it is about; an upload's error has it as its cause."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def told(error: Exception, token: str) -> str:
    """Its first line: of the Hub's answer, where there is one, or of what was at the bottom of it."""
    answers = [cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)]
    found = answers[0] if answers else [*causes(error)][-1]
    lines = struck(str(found), token).strip().splitlines()
    return lines[0].rstrip(":. ") if lines else type(found).__name__


def struck(message: str, token: str) -> str:
    return message.replace(token, "<token>")


def raise_told(error: Exception, repo_id: str, token: str) -> NoReturn:
    """As `retried` says."""
    status = status_of(error)
    holds_token = any(token in str(cause) for cause in causes(error))
    cause = None if holds_token else error
    if status == 401:
        raise ValueError(
            f"{repo_id}: the Hub does not accept the token: take one that is valid and may write, by `hf auth login`, "
            "HF_TOKEN or `token`"
        ) from cause
    if status == 403:
        raise ValueError(
            f"{repo_id}: the token may not write there: take one with write access, or name a repo of your own"
        ) from cause
    if is_passing(error):
        raise ConnectionError(
            f"{repo_id}: the Hub could not be reached in {len(WAITS) + 1} attempts ({told(error, token)}). The repo "
            "holds all of this push or nothing of it: push again later, the values are safe where they are"
        ) from cause
    if status is not None:
        message = " ".join(struck(str(error), token).split())
        raise ValueError(f"{repo_id}: the Hub refuses: {message}") from cause
    if holds_token:
        raise ValueError(struck(str(error), token)) from None
    raise error
