"""Makes features of a small training set and scores queries by them; alone, or as one of torchrun's processes.

Arguments: the store's folder; where to save scores; after how many shards to be killed (0: not).
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from models import build, collate, dataset, text_rows

from hf_datashapley import GradDot
from hf_datashapley.attribution import store


def main(folder, scores, kill_after):
    store.SHARD_UNITS = 2
    written = 0
    write = store.FeatureStore.write

    def counted(*arguments):
        nonlocal written
        write(*arguments)
        written += 1
        if written == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    store.FeatureStore.write = counted
    models = [build("gpt2", seed=seed) for seed in (0, 1)]
    made = GradDot(models, projection_dim=128, store_dir=folder, data_collator=collate, batch_size=2, progress=False)
    found = made.fit(dataset(text_rows(11))).score(dataset(text_rows(2, seed=7)))
    world = 1
    if "WORLD_SIZE" in os.environ:
        world = dist.get_world_size()
        assert world == int(os.environ["WORLD_SIZE"])
    np.save(f"{scores}-{os.environ.get('RANK', '0')}.npy", found)
    print(f"world {world}, {written} shards written")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
