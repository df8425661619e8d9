"""A process whose Hub is a server on this machine: its address has to be known before the Hub's client is imported."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hub_server import HubServer


TOKEN = "hf_SecretOfTheTests"


@dataclass
class Told:
    """How a call ended, and everything that was printed, logged, or would be shown of its error."""

    result: Any
    error: Exception | None
    text: str
    waited: list[float]


@dataclass
class Client:
    hub: HubServer
    pool: ProcessPoolExecutor

    def tell(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Told:
        told = self.pool.submit(called, call, args, kwargs).result()
        assert TOKEN not in told.text
        return told

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Its result; raises what it raised."""
        told = self.tell(call, *args, **kwargs)
        if told.error is not None:
            raise told.error
        return told.result

    def refused(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
        """What its ValueError or OSError says."""
        error = self.tell(call, *args, **kwargs).error
        assert isinstance(error, ValueError | OSError), error
        return str(error)


@contextlib.contextmanager
def client_of(hub: HubServer, home: Path) -> Iterator[Client]:
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
    }
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with patch.dict(os.environ, environment):
            pool.submit(os.getpid).result()
        yield Client(hub, pool)


def called(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Told:
    """In the other process. Nothing waits there: waits are noted."""
    waited: list[float] = []
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    loggers = [logging.getLogger(name) for name in (None, "transformers", "huggingface_hub", "datasets")]
    for logger in loggers:
        logger.addHandler(handler)
    result, error = None, None
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            with patch.object(time, "sleep", waited.append):
                result = call(*args, **kwargs)
    except Exception as raised:
        text.write("".join(traceback.format_exception(raised)))
        error = raised if isinstance(raised, ValueError | OSError) else RuntimeError(repr(raised))
        error.__cause__ = error.__context__ = None
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    return Told(result, error, text.getvalue(), waited)
