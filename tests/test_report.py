"""The report page: its numbers are the sums of its inputs, it needs nothing from outside, no text of the user's runs.

Looks are judged by eye and in a browser; here the page is parsed as HTML and read.
"""

from __future__ import annotations

import importlib
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from hf_datashapley.report import write_report
from hf_datashapley.report.nats import NatScale


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'--><svg onload=alert(3)>${{7*7}}\u2028$x_"


class Page(HTMLParser):
    """Tags with their attributes, the text outside of style and script, and the cells of the table of groups."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: dict[str, list[str]] = {}  # name -> data-value of each cell
        self.audit: list[list[float]] = []  # data-value of each cell, a list per target
        self._open: list[str] = []
        self._row: list[str] | None = None
        self._table: str | None = None
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        self._open.append(tag)
        if tag == "table":
            self._table = values.get("id")
        elif tag == "tr":
            self._row = None
        elif self._table == "audit":
            if tag == "th" and values.get("scope") == "row":
                self.audit.append([])
            elif tag == "td":
                self.audit[-1].append(float(str(values["data-value"])))
        elif self._table == "groups" and tag == "th" and values.get("scope") == "row":
            self._row = self.rows.setdefault(str(values["data-value"]), [])
        elif tag == "td" and self._row is not None:
            self._row.append(str(values["data-value"]))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self._open):
            self.text += data


def tiny_run(targets: tuple[str, ...] = ("code", "prose"), samples: int = 60, updates: int = 12) -> dict[str, Any]:
    """Two visits of each sample; two samples a document."""
    rng = np.random.default_rng(0)
    step = np.repeat(np.arange(1, updates + 1), 2 * samples // updates)
    sample_id = np.concatenate([rng.permutation(samples), rng.permutation(samples)]) * 3
    tokens = rng.integers(10, 50, samples)
    history: dict[str, Any] = {
        "sample_id": sample_id,
        "updates": np.ones(2 * samples, np.int32),
        "tokens": tokens[sample_id // 3],
        "step": step.astype(np.int32),
    }
    values: dict[str, Any] = {
        "sample_id": np.arange(samples) * 3,
        "updates": np.full(samples, 2, np.int32),
        "tokens": 2 * tokens,
    }
    losses = {}
    for column in (f"value_{target}" if target else "value" for target in targets):
        history[column] = rng.normal(1e-4, 1e-3, 2 * samples)
        values[column] = np.bincount(sample_id // 3, weights=history[column])
        losses[column.replace("value", "validation_loss")] = 5.0 - 0.1 * np.arange(updates)
    number = np.arange(samples)
    units = {
        "sample_id": (number * 3)[::-1],
        "document_id": (number // 2)[::-1],
        "domain": [("code", "prose")[n // 2 % 2] for n in number][::-1],
        "junk": ["base64" if n // 2 % 5 == 0 else None for n in number][::-1],
        "title": [f"title {n // 2}" for n in number][::-1],
        "text": [f"[text of {n}]" for n in number][::-1],
    }
    return {
        "values": Dataset.from_dict(values),
        "history": Dataset.from_dict(history),
        "updates": Dataset.from_dict(
            {
                "step": np.arange(1, updates + 1, dtype=np.int32),
                "skipped": np.zeros(updates, bool),
                "clip": np.ones(updates),
                "learning_rate": np.full(updates, 1e-3),
                **losses,
            }
        ),
        "units": Dataset.from_dict(units),
        "settings": {"value_order": "first"},
        "cost": {"throughput kept": "91%"},
        "title": "a tiny run",
    }


def written(tmp_path: Path, **run: Any) -> Page:
    path = tmp_path / "runs" / "report.html"
    write_report(path, **run)
    page = Page(path)
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", page.text, re.IGNORECASE), "a number that is none is shown"
    assert "NaN" not in page.source
    return page


def test_table_holds_the_sums_of_the_inputs(tmp_path: Path) -> None:
    run = tiny_run()
    page = written(tmp_path, **run)
    values = run["values"].to_pandas().merge(run["units"].to_pandas(), on="sample_id")
    values["group"] = values["domain"].where(values["junk"].isna(), "junk: " + values["junk"].astype(str))
    assert set(page.rows) == {"code", "prose", "junk: base64", "all"}
    values_of_all = values.assign(group="all")
    for rows in (values, values_of_all):
        for group, members in rows.groupby("group"):
            cells = [float(cell) for cell in page.rows[str(group)]]
            assert cells[:3] == [members["document_id"].nunique(), len(members), members["tokens"].sum()]
            for column, (total, rate, negative) in zip(
                ("value_code", "value_prose"), (cells[3:6], cells[6:9]), strict=True
            ):
                assert total == pytest.approx(members[column].sum(), rel=1e-12)
                assert rate == pytest.approx(1000 * members[column].sum() / members["tokens"].sum(), rel=1e-12)
                assert negative == pytest.approx((members[column] < 0).mean())


def test_standard_error_is_that_of_a_ratio_over_documents(tmp_path: Path) -> None:
    from hf_datashapley.report.aggregate import read_corpus, totals

    run = tiny_run(targets=("",))
    corpus = read_corpus(run["values"], run["units"])
    found = totals(corpus, corpus.group_N, len(corpus.groups)).error_KG[0]
    rows = run["values"].to_pandas().merge(run["units"].to_pandas(), on="sample_id")
    documents = rows[rows["junk"] == "base64"].groupby("document_id")[["value", "tokens"]].sum()
    rest = documents["value"] - documents["tokens"] * documents["value"].sum() / documents["tokens"].sum()
    expected = np.sqrt(len(documents) / (len(documents) - 1) * (rest**2).sum())
    assert found[corpus.groups.index("junk: base64")] == pytest.approx(expected, rel=1e-12)


def test_value_over_training_ends_at_the_totals() -> None:
    from hf_datashapley.report.aggregate import read_corpus, totals, value_over_training

    run = tiny_run()
    corpus = read_corpus(run["values"], run["units"])
    curves = value_over_training(corpus, run["history"], np.arange(1, 13))
    assert curves.shape == (2, 3, 12)
    np.testing.assert_allclose(curves[:, :, -1], totals(corpus, corpus.group_N, 3).value_KG, rtol=1e-12)


def test_samples_with_a_row_for_each_document_count_once(tmp_path: Path) -> None:
    """As a ledger of documents or tokens has them: halves of what the samples have, which are dyadic sums."""
    run = tiny_run()
    whole = written(tmp_path / "samples", **run)
    for name in ("values", "history"):
        table = run[name].to_pandas()
        numbers = ["tokens", "value_code", "value_prose"]
        halves = pd.concat([table.assign(document_id=d, **{c: table[c] / 2 for c in numbers}) for d in (8, 9)])
        run[name] = Dataset.from_pandas(halves, preserve_index=False)
    parted = written(tmp_path / "documents", **run)
    assert parted.rows == whole.rows
    assert "60 samples of 30 documents" in re.sub(r"\s+", " ", parted.text)


def test_headline(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", written(tmp_path, **tiny_run()).text)
    assert "60 samples of 30 documents" in text and "12 updates" in text and "code, prose" in text
    assert "1.10 nats (5.00 → 3.90)" in text
    assert "91%" in text


def audit_of(targets: tuple[str, ...], updates: int) -> Dataset:
    """Every other update was audited."""
    rng = np.random.default_rng(1)
    rows = []
    for step in range(2, updates + 1, 2):
        for target in targets:
            samples, carried, error = rng.normal(0.01, 0.01, 3)
            row = {"step": step, "target": target, "samples": samples, "carried": carried}
            rows.append({**row, "predicted": samples + carried, "actual": samples + carried + error})
    return Dataset.from_list(rows)


def test_audit_shows_its_sums(tmp_path: Path) -> None:
    audit = audit_of(("code", "prose"), 12)
    page = written(tmp_path, **tiny_run(), audit=audit)
    rows = audit.to_pandas()
    expected = [
        [*rows.loc[rows["target"] == target, ["samples", "carried", "predicted", "actual"]].sum(), 6]
        for target in ("code", "prose")
    ]
    np.testing.assert_allclose(page.audit, expected, rtol=1e-12)
    assert "Do the values add up?" in page.text
    assert f"{expected[0][2]:+.4f}" in page.text


def test_audit_without_rows_is_not_spoken_of(tmp_path: Path) -> None:
    for audit in (None, audit_of(("code", "prose"), 12).select([])):
        page = written(tmp_path, **tiny_run(), audit=audit)
        assert not page.audit and "add up?" not in page.text


def test_audit_of_an_unnamed_target(tmp_path: Path) -> None:
    audit = audit_of(("validation",), 12)
    page = written(tmp_path, **tiny_run(targets=("",)), audit=audit)
    np.testing.assert_allclose(page.audit, [[*(sum(audit[name]) for name in audit.column_names[2:]), 6]], rtol=1e-12)


def test_audited_updates_that_went_astray_are_left_out(tmp_path: Path) -> None:
    rows = audit_of(("code", "prose"), 12).to_list()
    rows[0]["actual"] = float("nan")
    rows[-1]["actual"] = rows[-1]["predicted"] = float("inf")
    page = written(tmp_path, **tiny_run(), audit=Dataset.from_list(rows))
    assert [cells[4] for cells in page.audit] == [5, 5]
    assert page.audit[0][3] == pytest.approx(sum(row["actual"] for row in rows[2::2]))


def test_many_audited_updates_are_thinned_out(tmp_path: Path) -> None:
    run = tiny_run(targets=("",), samples=600, updates=600)
    page = written(tmp_path, **run, audit=audit_of(("validation",), 600))
    assert page.audit[0][4] == 300
    assert "(60 of 300 are drawn)" in page.text


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = written(tmp_path, **tiny_run(), audit=audit_of(("code", "prose"), 12))
    assert "http://" not in page.source and "https://" not in page.source
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "action", "srcset"} & set(attributes)
        assert (attributes.get("xlink:href") or "#").startswith("#")
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page.source) and "@import" not in page.source


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = tiny_run(targets=(HOSTILE,))
    for column in ("domain", "junk", "title", "text"):
        filled = [value and HOSTILE for value in run["units"][column]]
        run["units"] = run["units"].remove_columns(column).add_column(column, filled)
    run |= {"settings": {HOSTILE: HOSTILE}, "cost": {HOSTILE: HOSTILE, "throughput kept": HOSTILE}, "title": HOSTILE}
    page = written(tmp_path, **run)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "img" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script><img src=x onerror=alert(2)>\"'--><svg onload=alert(3)>") > 10


def test_documents_show_their_rows_in_order(tmp_path: Path) -> None:
    run = tiny_run(targets=("",))
    page = written(tmp_path, **run)
    rows = run["values"].to_pandas().merge(run["units"].to_pandas(), on="sample_id")
    best = rows.groupby("document_id")["value"].sum().idxmax()
    assert f"[text of {2 * best}][text of {2 * best + 1}]" in page.text
    assert f"title {best}" in page.text and f"document {best} " in page.text
    shown = set(re.findall(r"\[text of \d+\]", page.source))
    assert len(shown) <= 2 * 12, "only the shown texts are embedded"


def test_long_text_is_cut(tmp_path: Path) -> None:
    run = tiny_run(samples=12, updates=6)
    run["units"] = run["units"].remove_columns("text").add_column("text", ["x" * 100_000] * 12)
    page = written(tmp_path, **run)
    assert "the rest is not shown" in page.text
    assert len(page.source) < 400_000


def test_unnamed_target_without_units(tmp_path: Path) -> None:
    run = tiny_run(targets=("",)) | {"units": None}
    page = written(tmp_path, **run)
    assert set(page.rows) == {"samples", "all"}
    assert float(page.rows["all"][2]) == pytest.approx(sum(run["values"]["value"]))
    best = run["values"]["sample_id"][int(np.argmax(run["values"]["value"]))]
    assert f"sample {best}" in page.text


def test_units_without_a_domain_or_with_nulls(tmp_path: Path) -> None:
    run = tiny_run()
    domains = [None if i % 3 else "web" for i in range(60)]
    some = run["units"].remove_columns(["domain", "junk", "document_id"]).add_column("domain", domains)
    assert set(written(tmp_path, **run | {"units": some}).rows) == {"web", "no domain", "all"}
    none = run["units"].remove_columns(["domain", "title", "text"])
    assert set(written(tmp_path, **run | {"units": none}).rows) == {"samples", "junk: base64", "all"}


def test_many_domains_are_folded(tmp_path: Path) -> None:
    run = tiny_run()
    units = run["units"].remove_columns(["domain", "junk"]).add_column("domain", [f"site {i}" for i in range(60)])
    page = written(tmp_path, **run | {"units": units})
    assert "31 smaller ones" in page.rows and len(page.rows) == 31
    total = sum(float(cells[3]) for name, cells in page.rows.items() if name != "all")
    assert total == pytest.approx(float(page.rows["all"][3]))


def test_one_sample_and_one_update(tmp_path: Path) -> None:
    run = tiny_run(samples=1, updates=1)
    page = written(tmp_path, **run)
    assert page.rows["all"][:2] == ["1", "1"]
    assert "±" not in "".join(re.findall(r"<td.*?</td>", page.source)), "one document has no standard error"


def test_values_and_tokens_all_zero(tmp_path: Path) -> None:
    run = tiny_run()
    for name in ("values", "history"):
        table = run[name].to_dict()
        zeros = {c: [0] * 60 if name == "values" else [0] * 120 for c in ("tokens", "value_code", "value_prose")}
        run[name] = Dataset.from_dict(table | {c: np.array(v, float if "v" in c else int) for c, v in zeros.items()})
    page = written(tmp_path, **run)
    assert {float(cell) for cell in page.rows["all"][2:]} == {0.0}
    assert "None has a positive value." in page.text and "None has a negative value." in page.text


def test_skipped_updates_and_unmeasured_losses(tmp_path: Path) -> None:
    run = tiny_run(targets=("",))
    table = run["updates"].to_dict()
    table["skipped"] = [step in (4, 9) for step in table["step"]]
    table["validation_loss"] = [
        None if step == 4 else float("nan") if step == 9 else loss
        for step, loss in zip(table["step"], table["validation_loss"], strict=True)
    ]
    page = written(tmp_path, **run | {"updates": Dataset.from_dict(table)})
    assert "2 of the updates were skipped" in page.text
    assert "Update 4, 9." in page.text
    assert "Skipped updates" not in written(tmp_path, **tiny_run()).text


def test_no_loss_was_measured(tmp_path: Path) -> None:
    run = tiny_run(targets=("",))
    updates = run["updates"].remove_columns("validation_loss").add_column("validation_loss", [float("nan")] * 12)
    assert "Validation loss" not in written(tmp_path, **run | {"updates": updates}).text


def test_refusals(tmp_path: Path) -> None:
    run = tiny_run()
    with pytest.raises(ValueError, match="units lacks 1 of the 60 samples with a value, sample_id 177 first"):
        written(tmp_path, **run | {"units": run["units"].select(range(1, 60))})
    with pytest.raises(ValueError, match="more than one row for a sample_id"):
        written(tmp_path, **run | {"units": run["units"].select([0, 0, *range(1, 60)])})
    with pytest.raises(ValueError, match="nothing to report"):
        written(tmp_path, **run | {"values": run["values"].select([])})
    bad = run["values"].remove_columns("value_code").add_column("value_code", [float("nan")] * 60)
    with pytest.raises(ValueError, match="non-finite"):
        written(tmp_path, **run | {"values": bad})


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in [name for name in sys.modules if name.startswith("hf_datashapley.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'need {missing}.*pip install "hf_datashapley\[report\]"'):
        _ = importlib.import_module("hf_datashapley.report").write_report
    importlib.import_module("hf_datashapley.report.sources")  # which reads users' files for others, too


@pytest.mark.parametrize(
    ("nats", "texts", "unit"),
    [
        ([12.345, -0.5, 0.001], ["+12.3", "−0.5", "0.0"], "nats"),
        ([0.0123, -0.0004], ["+12.3", "−0.4"], "mnat"),
        ([4.56e-6, 0.0], ["+4.56", "0.00"], "µnat"),
        ([3.2e-12, -1e-13], ["+3.2e-12", "−1.0e-13"], "nats"),
        ([0.0], ["0.0"], "nats"),
        ([123456.7], ["+123,456.7"], "nats"),
    ],
)
def test_numbers_are_readable(nats: list[float], texts: list[str], unit: str) -> None:
    scale = NatScale.fitting(nats)
    assert ([scale.signed(x) for x in nats], scale.unit) == (texts, unit)
