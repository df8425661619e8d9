"""Run by torchrun from test_ddp.py: one case after the other, in each of two processes."""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ddp_cases import CASES, Poison, make, plain, tables, train
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_datashapley import ranks


class Witness(TrainerCallback):
    """What the training loop has while it runs; each rank asks for values once, all by itself, and then waits."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.wrapped = None
        self.updates = None

    def on_step_end(self, args, state, control, **kwargs):
        self.wrapped = type(self.trainer.model_wrapped)
        if state.global_step == 1 + args.process_index:
            self.updates = len(set(self.trainer.value_history()["step"]))
        dist.barrier()


def run(folder, name, case):
    trainer = make(folder / name, case, batch=case.batch)
    witness = Witness(trainer)
    trainer.add_callback(witness)
    if case.poisoned:
        trainer.add_callback(Poison(trainer, rank=1))
    train(trainer, case)
    assert (trainer.accelerator.num_processes, dist.get_world_size(), dist.get_backend()) == (2, 2, "gloo")
    assert witness.wrapped is DistributedDataParallel
    found = {"tables": tables(trainer), "logs": trainer.state.log_history, "midway": witness.updates}
    if case.parity:
        twin = plain(folder / f"{name}-plain", case, batch=case.batch)
        train(twin, case)
        pairs = zip(trainer.model.named_parameters(), twin.model.parameters(), strict=True)
        found["different"] = [name for (name, weight), truth in pairs if not torch.equal(weight, truth)]
    (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(found))


def main(folder):
    ranks.BUCKET = 300  # some tensors are larger, some smaller
    for name, case in CASES.items():
        run(folder, name, case)
        dist.barrier()
    # First let go of DDP's wrappers, as `kill_and_resume.py` does.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
