"""Documents token by token: every character in its place, every number the ledger's, colours as they are said."""

from __future__ import annotations

import re
from collections import defaultdict
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from ledger_rows import Piece, Visit, write_ledger
from token_ledgers import BLOCK, Run, byte_tokenizer, make_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_datashapley.report.decoding import decode, decode_spans
from hf_datashapley.report.run import Sources, report_run
from hf_datashapley.report.tokens import LEVELS, SHOWN, SPANS, choose, level


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'--><svg onload=alert(3)></pre>{{7*7}}"
TEXTS = [
    "plain words, and some more of them for a second row",
    "naïve café, 日本語のテキスト",
    "\n\n  def f(x):\n\treturn x\n",
    "🙂👩‍👩‍👧 משפט בעברית",
    "a � that was there before",
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


class TokenPage(HTMLParser):
    """The documents of the section: by their order in the page, their spans and what is said of each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.places: list[dict[int, int]] = []  # of each document, by target
        self.spans: list[list[tuple[str, str, str]]] = []  # of each document: text, classes, title
        self.heads: list[str] = []
        self._inside = self._text = self._span = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, dict(attrs)))
        self._inside |= values.get("id") == "tokens"
        if self._inside and tag == "li":
            self.places.append({int(k): int(n) for k, n in re.findall(r"--place-(\d+):(\d+);", values["style"])})
            self.heads.append("")
        elif self._inside and tag == "pre":
            self._text = True
            self.spans.append([])
        elif self._text and tag == "span":
            self._span = True
            self.spans[-1].append(("", values.get("class", ""), values["title"]))

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._inside = False
        elif tag == "pre":
            self._text = False
        elif tag == "span":
            self._span = False

    def handle_data(self, data: str) -> None:
        if self._span and self._text:
            text, classes, title = self.spans[-1][-1]
            self.spans[-1][-1] = (text + data, classes, title)
        elif self._inside and self.heads and not self._text:
            self.heads[-1] += data

    def document(self, title: str) -> list[tuple[str, str, str]]:
        """By the whole of a line in its head."""
        (found,) = [
            spans
            for spans, head in zip(self.spans, self.heads, strict=True)
            if title in [line.strip() for line in head.split("\n")]
        ]
        return found


def page_of(run: Run, **others: str | None) -> TokenPage:
    known = {"dataset": run.rows, "documents": run.documents, "tokenizer": run.tokenizer, **others}
    return TokenPage(report_run(str(run.folder), Sources(**known)))


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's: blanks are a letter of their words, and what it does not know is bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, limit_alphabet=20, show_progress=False)
    tokenizer.train_from_iterator(["plain words, and some more of them for a second row"], trainer)
    # Trained as special, so that they are there; but they are text.
    model = tokenizer.to_str().replace('"special":true', '"special":false')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(model))


@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_the_text(make, text):
    tokenizer = make()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) > len(text.split())
    spans = decode_spans(tokenizer, tokens)
    assert "".join(span.text for span in spans) == decode(tokenizer, tokens)
    assert sum(span.tokens for span in spans) == len(tokens)
    if make is byte_tokenizer:
        assert decode(tokenizer, tokens) == text
        for span in spans:
            # One character each, but for a replacement character that stands in the text and may be one in the making.
            assert len(span.text) == 1 or "\ufffd" in span.text
            assert span.tokens == len(span.text.encode())


@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback_tokenizer])
def test_a_character_that_is_cut_off_spoils_no_other(make):
    tokenizer = make()
    tokens = tokenizer.encode("日本語", add_special_tokens=False)[-9:]
    spans = decode_spans(tokenizer, tokens[1:-1])
    assert [(span.text, span.tokens) for span in spans[:3]] == [("\ufffd", 1), ("\ufffd", 1), ("本", 3)]
    assert {span.text for span in spans[3:]} == {"\ufffd"}
    assert sum(span.tokens for span in spans[3:]) == 2


def test_tokens_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="has 256 tokens, and the rows of --dataset hold token 256.*name the tokeni"):
        decode_spans(byte_tokenizer(), [1, 256])


def by_document(run: Run) -> dict[int, dict[tuple[int, int], list[Fraction]]]:
    """Of each document the value of each (sample, position), summed over visits."""
    found: dict[int, dict[tuple[int, int], list[Fraction]]] = defaultdict(dict)
    for visit in run.visits:
        for piece in visit.pieces:
            for place, nats in enumerate(piece.values, piece.position):
                key = visit.sample_id, place
                before = found[piece.document_id].get(key, [Fraction()] * len(nats))
                found[piece.document_id][key] = [a + b for a, b in zip(before, nats, strict=True)]
    return found


def number(said: str) -> float:
    found = re.fullmatch(r"([+−]?)([\d.]+) (nats|mnat|µnat)(?: for .*)?", said)
    assert found is not None, said
    sign, digits, unit = found.groups()
    return (-1 if sign == "−" else 1) * float(digits) / {"nats": 1, "mnat": 1e3, "µnat": 1e6}[unit]


def test_every_token_has_the_ledgers_value_and_its_colour(tmp_path):
    """The bytes of a character have their sum; what has no loss has no colour."""
    run = make_run(tmp_path, TEXTS)
    page = page_of(run)
    rows = datasets.load_from_disk(run.rows)
    assert len(page.spans) == len(TEXTS)
    for document, values in by_document(run).items():
        owners = [(row["sample_id"], place, d) for row in rows for place, d in enumerate(row["document_id"])]
        tokens = iter([(sample_id, place) for sample_id, place, owner in owners if owner == document])
        expected = []
        for text, _, title in page.document(f"title {document}"):
            several = re.search(r"(\d+) tokens, their sum", title)
            count = int(several[1]) if several else 1
            assert count == len(text.encode()) or "\ufffd" in text, "a row's end cuts characters"
            own = [values[key] for key in (next(tokens) for _ in range(count)) if key in values]
            expected.append([float(sum(column)) for column in zip(*own, strict=True)] if own else None)
        assert next(tokens, None) is None
        known = np.array([nats for nats in expected if nats is not None])
        full_K = [np.quantile(abs(column), 0.98, method="higher") for column in known.T]
        for (_, classes, title), nats in zip(page.document(f"title {document}"), expected, strict=True):
            colours = set(classes.split()) - {"line"}
            if nats is None:
                assert colours == {"none"} and title == "no loss here"
                continue
            for said, target, own, full in zip(title.split("\n"), run.targets, nats, full_K, strict=False):
                assert said.endswith(f" for {target}")
                assert number(said) == pytest.approx(own, abs=full / 100)
            levels = [round(LEVELS * max(-1.0, min(1.0, own / full))) for own, full in zip(nats, full_K, strict=True)]
            assert colours == {f"{'p' if x > 0 else 'n'}{k}-{abs(x)}" for k, x in enumerate(levels) if x}


def test_documents_are_ordered_for_each_target(tmp_path):
    run = make_run(tmp_path, [f"document number {d}" for d in range(9)])
    page = page_of(run)
    sums = {d: [sum(column) for column in zip(*found.values(), strict=True)] for d, found in by_document(run).items()}
    for k in range(2):
        falling = sorted(sums, key=lambda d: -sums[d][k])
        shown = sorted(range(9), key=lambda i: page.places[i][k])
        assert [f"title {d}" in page.heads[i] for i, d in zip(shown, falling, strict=True)] == [True] * 9
    assert [places[0] for places in page.places] == list(range(9)), "the page begins with the first target"


def test_a_document_of_several_samples_shows_those_with_token_values(tmp_path):
    text = "a first row of forty letters, and then some more, up to the third row, which has no values of tokens."
    run = make_run(tmp_path, [text, "another one"], with_tokens=[0, 1])
    page = page_of(run)
    assert len(page.spans) == 1
    assert "".join(span for span, *_ in page.document("title 0")) == text[: 2 * BLOCK]
    assert page.source.count('title="goes on in sample 1"') == 1
    assert re.search(r"78 tokens of this document, which is worth [+−]", page.heads[0])
    whole = page_of(make_run(tmp_path / "whole", [text]))
    assert "which is worth" not in whole.heads[0]


def test_only_the_best_and_worst_are_in_the_page(tmp_path):
    run = make_run(tmp_path, [f"text{d:04d}" for d in range(400)])
    page = page_of(run)
    assert len(page.spans) == SHOWN
    sums = {d: [sum(column) for column in zip(*found.values(), strict=True)] for d, found in by_document(run).items()}
    for k in range(2):
        rising = sorted(sums, key=lambda d: sums[d][k])
        for document in (*rising[:5], *rising[-5:]):
            assert page.document(f"title {document}")
    assert len(page.source) < 500_000


def test_long_documents_are_cut(tmp_path):
    page = page_of(make_run(tmp_path, ["x" * (SPANS + 100), "y" * 10]))
    assert sum(len(text) for text, *_ in page.document("title 0")) == SPANS
    assert page.source.count("(the rest is not shown)") == 1


def test_hostile_text_stays_text(tmp_path):
    run = make_run(tmp_path, [HOSTILE, "b"], targets=[HOSTILE, "prose"], titles=[HOSTILE, "t"], sources=[HOSTILE, "s"])
    page = page_of(run, group_column="source")
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1 and names.count("svg") == len(re.findall(r"<svg viewBox", page.source))
    assert "img" not in names
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "".join(text for text, *_ in page.document(HOSTILE)) == HOSTILE
    assert page.document(HOSTILE)[1][2].split("\n")[0].endswith(f"for {HOSTILE}")
    assert "http://" not in page.source and "https://" not in page.source


def test_one_target_without_a_name(tmp_path):
    page = page_of(make_run(tmp_path, ["one", "two"], targets=[""]))
    assert [(a.get("id"), "hidden" in a, "checked" in a) for tag, a in page.tags if a.get("type") == "radio"] == [
        ("target-0", True, True)
    ]
    assert not [a for tag, a in page.tags if tag == "label" and "for" in a]
    assert re.fullmatch(r"[+−][\d.]+ (nats|mnat)", page.document("title 0")[1][2])


def test_values_of_nothing_have_no_colour(tmp_path):
    run = make_run(tmp_path, ["one", "two"])
    zeros = [
        Visit(visit.step, visit.sample_id, [Piece(p.document_id, p.position, [[Fraction()] * 2] * 2)])
        for visit in run.visits
        for p in visit.pieces[:1]
    ]
    write_ledger(tmp_path / "values", zeros, "token", run.targets, with_tokens=[0])
    (spans,) = page_of(run).spans
    assert [(text, classes) for text, classes, _ in spans] == [("o", "none"), ("n", ""), ("e", "")]


def test_samples_where_the_ledger_knows_no_documents(tmp_path):
    """Their documents are -1; padding at the left is not counted by positions."""
    tokens = byte_tokenizer().encode("abc")
    visits = [Visit(1, i, [Piece(-1, 1, [[Fraction(i + 1)], [Fraction(-1)]])]) for i in range(3)]
    write_ledger(tmp_path / "values", visits, "token", [""], with_tokens=range(3))
    rows = [
        {"input_ids": [0, 0, *tokens], "attention_mask": [0, 0, 1, 1, 1], "source": f"s{i}", "title": f"title {i}"}
        for i in range(3)
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "packed")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    page = page_of(Run(tmp_path, [""], visits, "token"), documents=None, group_column="source")
    assert "title 2" in page.heads[0] and "title 0" in page.heads[2]
    assert [(text, title) for text, _, title in page.document("title 1")] == [
        ("a", "no loss here"),
        ("b", "+2.00 nats"),
        ("c", "−1.00 nats"),
    ]


def test_padding_is_no_document(tmp_path):
    """A row of a ledger of documents may be that of padding, which has no loss."""
    run = make_run(tmp_path, ["one", "two"], unit="document")
    with_padding = [Visit(v.step, v.sample_id, [*v.pieces, Piece(-1, 0, [[Fraction()] * 2])]) for v in run.visits]
    write_ledger(tmp_path / "values", with_padding, "document", run.targets)
    text = re.sub(r"\s+", " ", page_of(run).source)
    assert "2 documents," in text and "document -1" not in text


def test_rows_of_another_run_are_refused(tmp_path):
    run = make_run(tmp_path, ["some text of one run", "and another text, which is longer than a row"])
    other = make_run(tmp_path / "other", ["short", "and what else there is of it"])
    with pytest.raises(ValueError, match="sample 0 has values at positions where its row has no token of document 1"):
        page_of(run, dataset=other.rows)
    rows = datasets.load_from_disk(run.rows)
    rows.select([0]).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="--dataset has no row for sample 1, which has a value"):
        page_of(run, dataset=str(tmp_path / "one"))
    rows.remove_columns("document_id").save_to_disk(tmp_path / "plain")
    with pytest.raises(ValueError, match="documents cannot be told apart.*--document_id_column"):
        page_of(run, dataset=str(tmp_path / "plain"))


def test_choice_is_from_both_ends_of_each_target():
    value_KC = np.array([[5.0, 4, 3, 2, 1, 0], [0, 5, 4, 3, 2, 1]])
    assert choose(value_KC, shown=3) == [0, 5, 1]
    assert set(choose(value_KC, shown=4)) == {0, 5, 1, 4}
    assert sorted(choose(value_KC)) == list(range(6))


@pytest.mark.parametrize(
    ("value", "full", "expected"),
    [(0.0, 1.0, 0), (0.06, 1.0, 0), (0.07, 1.0, 1), (-0.5, 1.0, -4), (9.0, 1.0, 8), (-9.0, 1.0, -8), (0.0, 0.0, 0)],
)
def test_colour_is_the_share_of_the_scale(value, full, expected):
    assert level(value, full) == expected
