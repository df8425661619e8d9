"""The same script with values: what each row did to the loss on a file that is held out."""

import sysconfig
from pathlib import Path

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, set_seed

from hf_datashapley import ShapleyConfig, ShapleyTrainer


LENGTH = 128


def rows_of(files: list[Path]) -> Dataset:
    ids = [list(file.read_bytes()) for file in files]
    rows = [text[start : start + LENGTH] for text in ids for start in range(0, len(text) - LENGTH + 1, LENGTH)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def main() -> None:
    (args,) = HfArgumentParser(ShapleyConfig).parse_args_into_dataclasses()
    set_seed(args.seed)
    files = sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    trainer = ShapleyTrainer(
        model=GPT2LMHeadModel(config),
        args=args,
        train_dataset=rows_of(files[1:]),
        validation_dataset=rows_of(files[:1]),
    )
    trainer.train()
    print(trainer.values().sort("value", reverse=True).select(range(5)).to_pandas())


if __name__ == "__main__":
    main()
