"""The report in a real browser: it renders, runs nothing of the corpus, sorts, finds, prints, and says no error."""

from pathlib import Path

import numpy as np
import pytest
from browser import Browser, Page, chromium
from datasets import Dataset
from test_report import HOSTILE, tiny_run

from hf_datashapley.report import write_report


pytestmark = pytest.mark.skipif(chromium() is None, reason="no chromium is installed (apt install chromium)")


@pytest.fixture(scope="module")
def browser():
    with Browser() as running:
        yield running


def opened(browser: Browser, folder: Path, run: dict) -> Page:
    write_report(folder / "report.html", **run)
    return browser.open(folder / "report.html")


def names(page: Page, table: str) -> list[str]:
    """Of the rows that can be seen, from above."""
    return page.evaluate(
        f"[...document.querySelectorAll('#{table} tbody tr')].filter(row => row.offsetHeight)"
        ".map(row => row.cells[0].dataset.value)"
    )


def numbers(page: Page, table: str, column: int) -> list[float]:
    found = page.evaluate(
        f"[...document.querySelectorAll('#{table} tbody tr')].map(r => r.cells[{column}].dataset.value)"
    )
    return [float(value) for value in found]


def typed(page: Page, text: str) -> None:
    page.click("input[data-table=documents]")
    page.evaluate("document.querySelector('input[data-table=documents]').select()")
    for key in text:
        page.press(key)


def test_renders_by_itself(browser, tmp_path):
    page = opened(browser, tmp_path, tiny_run())
    assert page.evaluate("document.title") == "a tiny run · data values"
    assert page.evaluate("document.querySelector('main').offsetHeight") > 2000
    # Pictures are there, and of some size.
    sizes = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().height)"
    )
    assert len(sizes) == 9 and min(sizes) > 50
    # Nothing sticks out sideways, also where it is narrow.
    for width in (1200, 400):
        narrow = browser.open(tmp_path / "report.html", width=width)
        assert narrow.evaluate("document.documentElement.scrollWidth") <= width
        assert narrow.troubles == [] and narrow.requests == []


def test_tables_sort(browser, tmp_path):
    page = opened(browser, tmp_path, tiny_run())
    before = numbers(page, "groups", 4)
    page.click("#groups thead tr:last-child th:nth-child(5)")
    assert numbers(page, "groups", 4) == sorted(before, reverse=True) != before
    page.press("Enter")  # the heading that was clicked has the focus
    assert numbers(page, "groups", 4) == sorted(before)
    page.click("#groups thead tr:last-child th")
    assert names(page, "groups") == sorted(names(page, "groups"))
    page.click("#documents thead th:nth-child(4)")
    assert numbers(page, "documents", 3) == sorted(numbers(page, "documents", 3), reverse=True)
    assert page.evaluate("document.querySelector('#documents thead th:nth-child(4)').ariaSort") == "descending"
    assert page.troubles == []


def test_search_finds(browser, tmp_path):
    page = opened(browser, tmp_path, tiny_run())
    every = names(page, "documents")
    assert len(every) == 30
    typed(page, "title 2")
    assert sorted(names(page, "documents")) == sorted(n for n in every if "2" in n)
    typed(page, "27 PROSE")
    assert names(page, "documents") == ["title 27"]
    assert page.evaluate("document.querySelector('.search output').value") == "1 of 30"
    typed(page, "nothing of the kind")
    assert names(page, "documents") == []
    typed(page, " ")
    assert names(page, "documents") == every
    assert page.troubles == []


def test_hostile_text_does_not_run(browser, tmp_path):
    run = tiny_run()
    units = run["units"].to_dict()
    hostile = {key: [HOSTILE] * 60 for key in ("domain", "title", "text")}
    page = opened(browser, tmp_path, run | {"units": Dataset.from_dict(units | hostile), "title": HOSTILE})
    # An alert would have stopped the page; a request that the policy refuses is a trouble.
    assert page.troubles == [] and page.requests == []
    assert page.evaluate("document.querySelectorAll('main script, main img, svg[onload]').length") == 0
    assert page.evaluate("document.querySelector('h1').textContent") == HOSTILE
    typed(page, "<img")
    assert len(names(page, "documents")) == 30


def test_dark_and_print(tmp_path):
    write_report(tmp_path / "report.html", **tiny_run())
    with Browser(dark=True) as dark:
        page = dark.open(tmp_path / "report.html")
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red, green, blue = (int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(","))
        assert max(red, green, blue) < 64
        page.printed(tmp_path / "report.pdf")
        assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF") and page.troubles == []


@pytest.mark.slow
def test_a_million_units(browser, tmp_path):
    """No larger a page than of a thousand, but for the numbers' lengths."""
    count, rng = 1_000_000, np.random.default_rng(0)
    run = tiny_run()
    ids = np.arange(count)
    columns = {"sample_id": ids, "updates": np.ones(count, np.int32), "tokens": np.full(count, 100)}
    columns |= {f"value_{target}": rng.normal(0, 1e-4, count) for target in ("code", "prose")}
    values = Dataset.from_dict(columns)
    history = values.add_column("step", (ids % 12 + 1).astype(np.int32))
    page = opened(browser, tmp_path, run | {"values": values, "history": history, "units": None})
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert len(names(page, "documents")) <= 800 and page.troubles == []
    page.click("#documents thead th:nth-child(3)")
    found = numbers(page, "documents", 2)
    assert found == sorted(found, reverse=True)
