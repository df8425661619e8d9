"""Kill training runs at random moments, resume them, and hold their ledgers against that of a run never interrupted.

A small GPT-2 trains with dropout, accumulation, clipping and checkpoints. Every attempt is a process (or several, with
DDP) of its own, which is killed by SIGKILL at a moment drawn anew, whatever it is doing: loading, training, writing a
part of the ledger or a checkpoint. The next attempt resumes from the last checkpoint, as a job script would. When a
run gets through, all its tables must be the uninterrupted run's, bit for bit, and another run is begun, until there
were enough kills; those before the first checkpoint, after which nothing is left to go on from, do not count.

    python scripts/kill_and_resume.py                                  # 20 kills of a run of one process
    python scripts/kill_and_resume.py --processes 2 --value_order path
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, PrinterCallback

from hf_datashapley import ShapleyConfig, ShapleyTrainer, load_audit, load_updates, load_value_history
from hf_datashapley.trainer.checkpoints import last_checkpoint


# Attempts within which a run gets through, if it gets anywhere at all.
PATIENCE = 60
# Seconds after which an attempt that is not to be killed hangs.
HANGS = 180
# Part of an uninterrupted run's time within which an attempt is killed; a resumed one has less to do.
SPAN = 0.7
VOCABULARY = 101
LENGTH = 12


@dataclass
class Setting:
    """What is killed, and how often."""

    kills: int = field(default=20, metadata={"help": "Of attempts that leave a checkpoint to go on from."})
    processes: int = field(default=1, metadata={"help": "Processes that train together (DDP); all are killed."})
    updates: int = field(default=60, metadata={"help": "Of a run."})
    save_steps: int = 3
    value_order: str = "first"
    validation_interval: int = field(default=1, metadata={"help": "Order 'first' only."})
    seed: int = field(default=0, metadata={"help": "Of the moments."})


def random_rows(count: int, seed: int) -> Dataset:
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def train(folder: str, setting: Setting, rank: int, port: int) -> None:
    """One attempt: from the last checkpoint, if there is one. Run in a process of its own."""
    faulthandler.dump_traceback_later(HANGS - 10)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()
    if setting.processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting.processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="localhost")
    make_and_run(folder, setting)
    if setting.processes > 1:
        # Only when nothing holds DDP's wrapper any more: a process whose run was over has been seen to hang where
        # Python frees what the function held, while a thread that was not Python's waited for Python.
        gc.collect()
        dist.destroy_process_group()


def make_and_run(folder: str, setting: Setting) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    trainer = ShapleyTrainer(
        GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)),
        ShapleyConfig(
            output_dir=folder,
            max_steps=setting.updates,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=setting.save_steps,
            save_total_limit=2,
            logging_steps=3,
            warmup_steps=5,
            learning_rate=1e-3,
            value_kernel="project",
            value_order=setting.value_order,
            validation_interval=setting.validation_interval,
            audit_steps=3,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=random_rows(50, seed=1),
        validation_dataset={"a": random_rows(5, seed=2), "b": random_rows(4, seed=3)},
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))


class Attempt:
    """The processes of one attempt."""

    def __init__(self, folder: Path, setting: Setting):
        if folder.exists() and last_checkpoint(str(folder)) is None:
            shutil.rmtree(folder)  # killed before its first checkpoint: nothing to go on from
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        self.processes: list[BaseProcess] = [
            context.Process(target=train, args=(str(folder), setting, rank, port)) for rank in range(setting.processes)
        ]
        for process in self.processes:
            process.start()

    def kill_after(self, seconds: float) -> bool:
        """Whether it had to be killed; all of its processes are, the first of them a moment before the others.

        Raises:
            RuntimeError: a process has failed by itself.
        """
        deadline = time.monotonic() + seconds
        while (running := [p for p in self.processes if p.is_alive()]) and not self.failed():
            left = deadline - time.monotonic()
            if not multiprocessing.connection.wait([p.sentinel for p in running], max(0.0, left)):
                break
        failed = self.failed()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        if failed:
            raise RuntimeError(f"an attempt ended with exit code {failed[0]}; its output is above")
        return bool(running)

    def get_through(self) -> None:
        """Let it train to its end.

        Raises:
            RuntimeError: a process has failed, or hangs.
        """
        if self.kill_after(HANGS):
            raise RuntimeError(f"an attempt hung for {HANGS} seconds; where its processes were is above")

    def failed(self) -> list[int]:
        return [p.exitcode for p in self.processes if p.exitcode]


def tables(folder: Path) -> list[dict[str, list[Any]]]:
    return [read(folder / "values")[:] for read in (load_value_history, load_updates, load_audit)]


def main() -> None:
    (setting,) = HfArgumentParser(Setting).parse_args_into_dataclasses()
    # For the processes to come, which share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "hf_datashapley.trainer"])
    draw = random.Random(setting.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        # Once for whatever is slow the first time only, and once for its seconds.
        for name in ("warm", "whole"):
            started = time.monotonic()
            Attempt(root / name, setting).get_through()
            seconds = time.monotonic() - started
        truth = tables(root / "whole")
        kills = runs = half_written = from_scratch = 0
        bar = tqdm(total=setting.kills, desc="kills")
        while kills < setting.kills:
            runs += 1
            folder = root / f"run-{runs}"
            attempts_of_run = 0
            while kills < setting.kills:
                if not Attempt(folder, setting).kill_after(draw.uniform(0, SPAN * seconds)):
                    break
                attempts_of_run += 1
                newest = max((int(p.name[11:]) for p in folder.glob("checkpoint-*")), default=0)
                complete = last_checkpoint(str(folder))
                half_written += complete != (str(folder / f"checkpoint-{newest}") if newest else None)
                from_scratch += complete is None
                kills += complete is not None
                bar.update(complete is not None)
                if attempts_of_run > PATIENCE:
                    raise RuntimeError(f"{folder} does not get anywhere after {attempts_of_run} attempts")
            else:
                Attempt(folder, setting).get_through()
            if tables(folder) != truth:
                print(json.dumps({"killed": tables(folder), "whole": truth}), file=sys.stderr)
                raise RuntimeError(f"run {runs} left another ledger than the uninterrupted run (both are above)")
        bar.close()
    print(
        f"{kills} kills of {runs} runs ({setting.processes} processes, order {setting.value_order!r}, "
        f"{setting.updates} updates, a checkpoint every {setting.save_steps}), {half_written} in the midst of writing "
        f"one, and {from_scratch} more before the first; every ledger is that of a run never interrupted, bit for bit"
    )


if __name__ == "__main__":
    main()
