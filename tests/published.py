"""A copy of a repo of values as the Hub holds it: a folder for each config, with its rows in shards."""

from pathlib import Path

from hf_datashapley import load_value_history, load_values


def publish(ledger: Path, repo: Path, shards: int = 2) -> None:
    for name, table in (("values", load_values(ledger)), ("history", load_value_history(ledger))):
        (repo / name).mkdir(parents=True)
        for number in range(shards):
            part = table.shard(shards, number, contiguous=True)
            part.to_parquet(repo / name / f"train-{number:05d}-of-{shards:05d}.parquet")
