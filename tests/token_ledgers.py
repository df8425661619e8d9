"""A run's folder without a run: texts, the rows they are packed into, a tokenizer, and values of documents or tokens.

The tokenizer knows bytes only, so characters beyond ASCII take several tokens. Values are drawn, multiples of 1/1024.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

from datasets import Dataset
from ledger_rows import Piece, Visit, write_ledger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


BLOCK = 40


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's, with a vocabulary of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@dataclass(frozen=True)
class Run:
    """Of a document's piece in a sample the first token has no loss."""

    folder: Path
    targets: list[str]
    visits: list[Visit]
    unit: str

    @property
    def rows(self) -> str:
        return str(self.folder / "packed")

    @property
    def documents(self) -> str:
        return str(self.folder / "documents.parquet")

    @property
    def tokenizer(self) -> str:
        return str(self.folder / "tokenizer")


def make_run(
    folder: Path,
    texts: Sequence[str],
    *,
    unit: str = "token",
    targets: Sequence[str] = ("code", "prose"),
    with_tokens: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
) -> Run:
    """Documents laid one after the other into rows of BLOCK tokens; every row is trained on twice.

    `with_tokens`: samples whose tokens have values of their own; None: all.
    """
    tokenizer, random = byte_tokenizer(), Random(0)
    tokens = [(d, token) for d, text in enumerate(texts) for token in tokenizer.encode(text)]
    rows, visits = [], []
    for sample_id, start in enumerate(range(0, len(tokens), BLOCK)):
        row = tokens[start : start + BLOCK]
        row += [(-1, 0)] * (BLOCK - len(row))
        rows.append({"sample_id": sample_id, "input_ids": [t for _, t in row], "document_id": [d for d, _ in row]})
        for step in (1, 2):
            pieces = []
            for document in sorted({d for d, _ in row if d >= 0}):
                places = [i for i, (d, _) in enumerate(row) if d == document]
                nats = [[Fraction(random.randint(-512, 512), 1024) for _ in targets] for _ in places[1:]]
                pieces.append(Piece(document, places[0] + 1, nats))
            visits.append(Visit(step, sample_id, pieces))
    chosen = range(len(rows)) if with_tokens is None else with_tokens
    write_ledger(folder / "values", visits, unit, list(targets), with_tokens=chosen)
    Dataset.from_list(rows).save_to_disk(folder / "packed")
    tokenizer.save_pretrained(folder / "tokenizer")
    titles = titles or [f"title {d}" for d in range(len(texts))]
    sources = sources or [f"source {d % 3}" for d in range(len(texts))]
    corpus = {"text": list(texts), "title": list(titles), "source": list(sources)}
    Dataset.from_dict(corpus).to_parquet(folder / "documents.parquet")
    return Run(folder, list(targets), visits, unit)
