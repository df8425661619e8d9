"""Tasks worked off by processes of one thread each.

Small models train fastest so: two threads for one of them mostly wait for each other. Processes are spawned, not
forked, since torch's threads do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm
from transformers.utils import logging


# What the tasks of this worker process are called with; empty elsewhere.
given: list[Any] = []


def work_off(
    argument: Any, tasks: Sequence[Callable[[Any], None]], workers: int, description: str, progress: bool
) -> None:
    """Calls every task with `argument`, which is pickled once for each of the `workers` processes; 0: calls it here.

    Raises:
        ValueError: a negative number of workers.
        Exception: the first that a task raised; tasks that had not begun are dropped.
    """
    if workers < 0:
        raise ValueError(f"workers={workers}: give the number of processes, or 0 for this one")
    if not tasks or not workers:
        for task in tqdm(tasks, description, disable=not progress):
            task(argument)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=begin, initargs=(argument,))
    try:
        futures = [executor.submit(work, task) for task in tasks]
        for future in tqdm(as_completed(futures), description, len(futures), disable=not progress):
            future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def begin(argument: Any) -> None:
    """In a worker process, once."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    given.append(argument)


def work(task: Callable[[Any], None]) -> None:
    task(given[0])


def end_with_parent() -> None:
    """A killed parent tells its children nothing: they would work on, and then wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
