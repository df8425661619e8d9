"""Real text of four domains out of the Python installation this runs in: no download, no network.

    code      source files of the standard library, docstrings cut out
    prose     `pydoc_data.topics` (the language reference), docstrings of the standard library and of packages that
              hf_datashapley depends on, with doctests and fenced code cut out
    licence   licence files of the installed distributions
    readme    long descriptions of the installed distributions

A source file gives either its code or its docstrings, never both: a file that is trained on as code cannot tell a
held-out docstring's names. Which one is drawn at random, with the seed. What an installation lacks makes its domain
smaller or empty; only a missing target domain stops the demo, and the message says what to do.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

from .corpus import Document


T = TypeVar("T")

DOMAINS = {"code": 0.42, "prose": 0.40, "licence": 0.08, "readme": 0.10}  # shares of the real text
TARGETS = ("code", "prose")
SHORTEST, LONGEST = 500, 20_000  # characters of a document; longer text is cut at a line's end
PROSE_PACKAGES = ("numpy", "huggingface_hub", "accelerate", "peft", "datasets", "pip")
# Not the library's own text (installed packages, vendored copies), or tables of data more than code.
LEFT_OUT = {"site-packages", "dist-packages", "_vendor", "test", "tests", "idle_test", "pydoc_data", "encodings"}
GENERATED = "_sysconfigdata"  # the settings and folders of the machine that built this Python


def harvest(characters: int, seed: int) -> list[Document]:
    """About `characters` of text, shared among the domains as `DOMAINS` says, in an order drawn with the seed.

    A domain of which the installation holds less is smaller. Near-duplicates are not removed yet.
    """
    generator = random.Random(seed)
    wanted = {domain: int(share * characters) for domain, share in DOMAINS.items()}
    found: list[Document] = []
    installed = _distributions(generator)
    with tqdm(total=sum(wanted.values()), desc="harvest", unit="ch", unit_scale=True) as bar:
        for domain, documents in (
            ("licence", _licences(installed)),
            ("readme", _readmes(installed)),
            ("prose", _topics(generator)),
            ("code or prose", _library_files(generator, wanted)),
            ("prose", _package_prose(generator)),
        ):
            bar.set_postfix_str(domain)
            for document in documents:
                if wanted[document.domain] > 0:
                    found.append(document)
                    wanted[document.domain] -= len(document.text)
                    bar.update(len(document.text))
                elif domain == document.domain:
                    break
    generator.shuffle(found)
    return found


def _document(text: str, domain: str, title: str) -> Iterator[Document]:
    text = text.strip()
    if len(text) > LONGEST:
        text = text[: text.rfind("\n", 0, LONGEST) + 1 or LONGEST]
    if len(text) >= SHORTEST:
        yield Document(text, domain, title)


def _licences(installed: dict[str, metadata.Distribution]) -> Iterator[Document]:
    for name, distribution in installed.items():
        for file in distribution.files or ():
            named_so = any(word in file.name.upper() for word in ("LICEN", "COPYING", "NOTICE"))
            if not named_so or file.suffix in (".py", ".pyc"):
                continue
            try:
                text = Path(str(file.locate())).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            yield from _document(text, "licence", f"{name}: {file.name}")


def _readmes(installed: dict[str, metadata.Distribution]) -> Iterator[Document]:
    for name, distribution in installed.items():
        description = distribution.metadata.json.get("description", "")
        yield from _document(str(description), "readme", f"{name}: README")


def _distributions(generator: random.Random) -> dict[str, metadata.Distribution]:
    installed = {}
    for distribution in metadata.distributions():
        about = distribution.metadata
        if "Name" in about:  # a broken installation leaves folders that lack it
            installed[about["Name"]] = distribution
    return {name: installed[name] for name in _shuffled(installed, generator)}


def _topics(generator: random.Random) -> Iterator[Document]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # split off by some distributors
        return
    for name in _shuffled(topics, generator):
        yield from _document(topics[name], "prose", f"language reference: {name}")


def _library_files(generator: random.Random, wanted: dict[str, int]) -> Iterator[Document]:
    """Code or prose of each file; prose of the next ones only once there is enough code, and the reverse."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in _python_files(library, generator):
        if wanted["code"] <= 0 and wanted["prose"] <= 0:
            return
        code, prose = split_source(_read_source(file))
        title = file.relative_to(library).as_posix()
        documents = list(_document(prose, "prose", f"{title} (docstrings)"))
        if not documents or generator.random() < 0.5:
            documents = list(_document(code, "code", title))
        yield from documents


def _package_prose(generator: random.Random) -> Iterator[Document]:
    for name in PROSE_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        package = Path(spec.origin).parent
        for file in _python_files(package, generator):
            _, prose = split_source(_read_source(file))
            title = f"{name}/{file.relative_to(package).as_posix()} (docstrings)"
            yield from _document(prose, "prose", title)


def _python_files(folder: Path, generator: random.Random) -> list[Path]:
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        files += [Path(place, name) for name in names if name.endswith(".py") and not name.startswith(GENERATED)]
    return _shuffled(files, generator)


def _shuffled(items: Iterable[T], generator: random.Random) -> list[T]:
    in_order = sorted(items, key=str)  # the order of a file system is not the same twice
    generator.shuffle(in_order)
    return in_order


def _read_source(file: Path) -> str:
    try:
        with tokenize.open(file) as stream:  # honours a coding line
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def split_source(source: str) -> tuple[str, str]:
    """A module's source without its docstrings, and its docstrings without the code in them; ("", "") if it does not
    parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in string literals
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # ValueError: a null byte
        return "", ""
    lines = source.splitlines()
    prose = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        prose.append(_without_examples(docstring))
        first = node.body[0]
        assert first.end_lineno is not None
        before = lines[first.lineno - 1].encode()[: first.col_offset].decode()
        if before.strip():  # `def f(): "text"`
            continue
        lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
        if len(node.body) == 1:
            lines[first.lineno - 1] = f"{before}pass"
    code = "\n".join(line for line, above in zip(lines, ["x", *lines], strict=False) if line.strip() or above.strip())
    return code, "\n\n".join(text for text in prose if text)


def _without_examples(docstring: str) -> str:
    """Doctests with their output, up to a blank line, and fenced blocks are code, not prose."""
    kept = []
    in_fence = in_doctest = False
    for line in docstring.splitlines():
        stripped = line.strip()
        if stripped.startswith("```"):
            in_fence = not in_fence
        elif not in_fence:
            in_doctest = stripped.startswith(">>>") or (in_doctest and bool(stripped))
            if not in_doctest:
                kept.append(line)
    return "\n".join(kept).strip()
