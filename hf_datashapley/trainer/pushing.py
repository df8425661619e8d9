"""Where the values of a run go when `Trainer` pushes its model, and pushes that go on while it trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from transformers.utils import logging

from ..hub import Source
from .config import ShapleyConfig


logger = logging.get_logger(__name__)


def source_of(args: ShapleyConfig) -> Source:
    return Source(args.source_dataset, args.source_revision, args.source_license)


class Background:
    """One push after the other, so that an older one never comes last. What fails is said, and training goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push-values")

    def start(self, push: Callable[[], Any]) -> Future[Any]:
        job = self._thread.submit(push)
        job.add_done_callback(say_failure)
        return job


def say_failure(job: Future[Any]) -> None:
    if not job.cancelled() and job.exception() is not None:
        logger.warning(f"Values were not pushed, and lie where they lay: {job.exception()}")
