"""Documents with a domain: read from a file, rid of near-duplicates, and split into training and held-out ones.

A document is the unit that must stay whole: it is held out as a whole, or near copies of a target's text would be
trained on and be worth much for the wrong reason. For the same reason near-duplicates go before the split. They are
found by containment: a document of which half or more of the 8-word shingles were seen in those kept before it is
dropped. That catches licences that differ in the holder's name and a text that is quoted inside a longer one, in one
pass and without parameters to fit, where MinHash would look for similar length too.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
from tqdm.auto import tqdm


WHOLE = "corpus"  # the domain of documents that have none
TRAIN, VALIDATION = "train", "validation"  # as a corpus calls its own splits
SHINGLE_WORDS = 8
SHINGLES_KEPT = 4  # one of so many, chosen by content
HELD_OUT_DOCUMENTS = 24  # of a target, at most
HELD_OUT_SHARE = 10  # one document of so many, at most


@dataclass(frozen=True)
class Document:
    """`junk` is the type of planted junk, None for real text; `title` says where the text is from, without a path of
    this machine; `split` is what the corpus says that it is for, None if it does not."""

    text: str
    domain: str
    title: str
    junk: str | None = None
    split: str | None = None


def read_corpus(path: str) -> list[Document]:
    """The documents of a Parquet or JSONL file with a column `text` and, where there are, `domain`, `title`, `split`.

    Rows whose text is null or blank are left out; a null domain becomes "none".

    Raises:
        ValueError: another kind of file, a broken line, no column `text`, or no text in it.
        OSError: the file cannot be read.
    """
    file = Path(path)
    kind = file.suffix.lower()
    if kind == ".parquet":
        rows = _read_parquet(file)
    elif kind in (".jsonl", ".json", ".ndjson"):
        rows = _read_json_lines(file)
    else:
        raise ValueError(f"--corpus {path}: the name must end in .parquet or .jsonl")
    has_domains = any("domain" in row for row in rows)
    documents = []
    for number, row in enumerate(rows):
        if "text" not in row:
            raise ValueError(f"--corpus {path}: row {number} has no `text` but {sorted(row)}; rename the column")
        text = row["text"]
        if not isinstance(text, str | None):
            raise ValueError(f"--corpus {path}: the `text` of row {number} is a {type(text).__name__}, not a string")
        if not text or text.isspace():
            continue
        domain = row.get("domain")
        name = ("none" if domain is None else str(domain)) if has_domains else WHOLE
        title, split = row.get("title"), row.get("split")
        documents.append(
            Document(
                text,
                name,
                f"document {number}" if title is None else str(title),
                split=None if split is None else str(split),
            )
        )
    if not documents:
        raise ValueError(f"--corpus {path}: no row has text")
    return documents


def _read_parquet(file: Path) -> list[dict[str, object]]:
    with file.open("rb") as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"--corpus {file}: not a Parquet file ({error})") from error
        names = parquet.schema_arrow.names
        if "text" not in names:
            raise ValueError(f"--corpus {file}: no column `text` among {names}; rename the column")
        table = parquet.read([name for name in ("text", "domain", "title", "split") if name in names])
        rows: list[dict[str, object]] = table.to_pylist()
        return rows


def _read_json_lines(file: Path) -> list[dict[str, object]]:
    rows = []
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"--corpus {file}: line {number} is not JSON ({error}); one object a line") from error
            if not isinstance(row, dict):
                raise ValueError(f"--corpus {file}: line {number} is not an object with a `text`")
            rows.append(row)
    return rows


def drop_near_duplicates(documents: Sequence[Document], show_progress: bool = True) -> list[Document]:
    """The documents of which more than half of the shingles are new, in the order given."""
    seen: set[int] = set()
    kept = []
    for document in tqdm(documents, desc="near-duplicates", unit="doc", disable=not show_progress, leave=False):
        shingles = _shingles(document.text)
        if len(shingles - seen) * 2 > len(shingles):
            kept.append(document)
            seen |= shingles
    return kept


def _shingles(text: str) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    if len(words) < SHINGLE_WORDS * SHINGLES_KEPT * 2:
        return {zlib.crc32(" ".join(words).encode())}
    # A checksum, not hash(): the choice must not differ from process to process.
    every = {
        zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode()) for i in range(len(words) - SHINGLE_WORDS + 1)
    }
    return {shingle for shingle in every if shingle % SHINGLES_KEPT == 0} or every


def choose_targets(documents: Sequence[Document], asked: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    """The domains whose loss is to be explained: those asked for, or `default` if they exist, or the two largest.

    Raises:
        ValueError: a domain that is asked for does not exist, or is too small to hold a document out.
    """
    count: dict[str, int] = {}
    size: dict[str, int] = {}
    for document in documents:
        count[document.domain] = count.get(document.domain, 0) + 1
        size[document.domain] = size.get(document.domain, 0) + len(document.text)
    large = [domain for domain in sorted(size, key=lambda d: (-size[d], d)) if count[domain] >= HELD_OUT_SHARE]
    if asked is not None:
        for domain in asked:
            if domain not in count:
                raise ValueError(f"--targets {domain}: no such domain; there are {', '.join(sorted(count))}")
            if domain not in large:
                raise ValueError(
                    f"--targets {domain}: only {count[domain]} documents after near-duplicates went; a target needs "
                    f"{HELD_OUT_SHARE}, so that one in {HELD_OUT_SHARE} can be held out. Choose among {large}"
                )
        return list(dict.fromkeys(asked))
    targets = [domain for domain in default if domain in large] or large[:2]
    if not targets:
        raise ValueError(
            f"no domain has {HELD_OUT_SHARE} documents, so none can be held out as a target: {count}. Give more text "
            "with --corpus (a row a document)"
        )
    return targets


def hold_out(
    documents: Sequence[Document], targets: Sequence[str], seed: int
) -> tuple[list[Document], dict[str, list[Document]]]:
    """Training documents in the order given, and for each target its held-out documents: one in ten, 24 at most.

    A corpus that has splits of its own is divided by them: all its validation documents of a target are held out, and
    only those of its training split are trained on.

    Raises:
        ValueError: there are splits, but no validation document of a target.
    """
    if any(document.split is not None for document in documents):
        return _own_splits(documents, targets)
    generator = random.Random(seed)
    held_out = {}
    taken: set[int] = set()
    for target in targets:
        members = [i for i, document in enumerate(documents) if document.domain == target and document.junk is None]
        chosen = generator.sample(members, max(1, min(HELD_OUT_DOCUMENTS, len(members) // HELD_OUT_SHARE)))
        held_out[target] = [documents[i] for i in chosen]
        taken.update(chosen)
    return [document for i, document in enumerate(documents) if i not in taken], held_out


def _own_splits(
    documents: Sequence[Document], targets: Sequence[str]
) -> tuple[list[Document], dict[str, list[Document]]]:
    held_out = {
        target: [document for document in documents if document.domain == target and document.split == VALIDATION]
        for target in targets
    }
    for target, kept in held_out.items():
        if not kept:
            raise ValueError(
                f"--targets {target}: the corpus has a column `split`, and no document of this domain whose split is "
                f"{VALIDATION!r}: choose another target, or leave the column out to have documents drawn"
            )
    return [document for document in documents if document.split == TRAIN], held_out
