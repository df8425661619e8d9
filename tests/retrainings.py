"""Retrainings that a spawned process can import: a linear one in no time, and a tiny language model's.

python retrainings.py FOLDER      makes the language model's bank there, to be killed on the way
"""

import sys

import numpy as np
from models import dataset
from transformers import GPT2Config, TrainingArguments

from hf_datashapley.evaluation import LanguageModelRetraining, random_masks


WEIGHTS = np.random.default_rng(0).normal(size=(12, 4))  # of rows, on queries
BASE = np.arange(4) + 20.0


def linear(rows, seed):
    """Each row lowers each query's loss by its weight."""
    return BASE - WEIGHTS[rows].sum(0) + seed


def failing(rows, seed):
    if 0 in rows:
        raise RuntimeError("no row 0, please")
    return linear(rows, seed)


def language_model(**settings):
    """Documents of two rows each; the rows differ in nothing but their tokens."""
    tokens = np.random.default_rng(1).integers(2, 61, (24, 10)).tolist()
    rows = dataset([{"input_ids": row, "labels": row} for row in tokens], ids=range(24))
    arguments = {
        "output_dir": "unused",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **settings,
    }
    shape = GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    return LanguageModelRetraining(shape, rows, rows.select([3, 1, 4, 1, 5]), TrainingArguments(**arguments))


def language_model_bank(folder, retraining):
    return retraining.bank(folder, random_masks(12, 8), np.arange(24) // 2, seeds=2)


if __name__ == "__main__":
    retraining = language_model()
    language_model_bank(sys.argv[1], retraining).run(retraining, workers=1, progress=False)
