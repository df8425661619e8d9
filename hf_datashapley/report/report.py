"""write_report: a finished run on one HTML page that needs nothing but a browser.

Sums come from `aggregate`, pictures from `pictures`, words and looks from `template.html`. Every string of the user's
passes through jinja2's autoescape, and the page forbids itself by a content security policy to load anything or to run
any script but its own: the corpus is text from anywhere. Importing this module is what needs the extra "report", so
that a long job which imports it first does not train for nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_datashapley.report.aggregate import (
    Audit,
    Corpus,
    Floats,
    Ints,
    Totals,
    arrow_table,
    read_audits,
    read_corpus,
    target_column,
    totals,
    value_over_training,
)
from hf_datashapley.report.documents import LISTED, Known, ends, listed
from hf_datashapley.report.nats import NatScale
from hf_datashapley.report.tokens import LEVELS, TokenTexts, token_documents


try:
    import jinja2

    from hf_datashapley.report import pictures
except ModuleNotFoundError as error:
    if error.name not in ("jinja2", "matplotlib"):
        raise
    raise ImportError(
        f'reports need {error.name}, which is not installed: pip install "hf_datashapley[report]"'
    ) from error


STEPS_LISTED = 50


@dataclass(frozen=True)
class Fall:
    """The measured validation loss of a target: each update draws other rows, so the end is a mean."""

    first: float
    last: float
    over: int  # updates that `last` is the mean of

    @property
    def nats(self) -> float:
        return self.first - self.last


@dataclass(frozen=True)
class Picture:
    target: str | None  # None: all of them
    label: str
    svg: str


def write_report(
    path: str | os.PathLike[str],
    *,
    values: Dataset,
    history: Dataset,
    updates: Dataset,
    units: Dataset | None,
    settings: dict[str, object],
    cost: dict[str, object],
    title: str,
    audit: Dataset | None = None,
    group: str = "domain",
    read_text: Callable[[int], str] | None = None,
    token_texts: TokenTexts | None = None,
) -> None:
    """Write one self-contained HTML file to `path`; its folder is made if need be.

    Args:
        values: one row per sample: `sample_id`, `updates`, `tokens`, then `value`, or `value_<target>` per named
            target, in nats of validation loss (positive: the sample lowered it). Where samples hold several documents,
            one per document: `document_id` in place of `sample_id`.
        history: the same per (update, sample or document), with `step`.
        updates: one row per update: `step`, `skipped`, `clip`, `learning_rate`, `validation_loss` or
            `validation_loss_<target>` in nats (null or non-finite where it was not measured).
        units: what is known of the samples, one row per `sample_id`, in any order; optional columns `document_id`,
            `domain`, `junk` (the type of planted junk or null), `title`, `text`. Or of the documents, where these have
            the values, one row per `document_id`. None: they are shown by their ids.
        settings: name -> printable, in the order to show.
        cost: name -> printable; "throughput kept", where there is one, also stands at the top of the page.
        title: what was trained.
        audit: one row per audited update and target: `step`, `target` ("validation" where it has no name), `samples`,
            `carried`, `predicted`, `actual` in nats. None, or no rows: nothing is said of it.
        group: what the groups of the column `domain` are called on the page.
        read_text: the text of a unit with this id, asked for the few that are shown where `units` has no `text`.
        token_texts: what units say and are worth token by token. None: tokens have no values, or no text.

    Raises:
        ValueError: `values` is empty or not finite; `units` lacks a valued unit or has one twice.
    """
    corpus = read_corpus(values, units)
    by_group = totals(corpus, corpus.group_N, len(corpus.groups))
    overall = totals(corpus, np.zeros_like(corpus.group_N), 1)
    total_scale = NatScale.fitting(by_group.value_KG, digits=4)  # groups differ in size, often by much
    rate_scale = NatScale.fitting(by_group.per_1000_tokens(by_group.value_KG))
    update_table = arrow_table(updates, updates.column_names).sort_by("step")
    step_T = update_table["step"].to_numpy()
    skipped = step_T[update_table["skipped"].to_numpy().astype(bool)]
    losses = [
        _finite(step_T, update_table[target_column(target, "validation_loss")].to_numpy()) for target in corpus.targets
    ]

    known = Known(corpus, units, read_text)
    audits = {} if audit is None else read_audits(audit, corpus.targets)

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["csp_hash"] = _csp_hash
    page = environment.get_template("template.html").render(
        title=title,
        targets=_names(corpus.targets),
        corpus=corpus,
        group_name=group,
        by_group=by_group,
        extremes=_extremes(by_group),
        overall=overall,
        falls=[_fall(loss) for _, loss in losses],
        pictures={
            **_pictures(corpus, by_group, total_scale, rate_scale, history, step_T, losses, skipped),
            "audit": _audit_pictures(audits),
        },
        documents=ends(known),
        listed=listed(known),
        listed_ends=LISTED,
        token_documents=[] if token_texts is None else token_documents(known, token_texts),
        levels=LEVELS,
        updates=len(step_T),
        skipped=skipped[:STEPS_LISTED].tolist(),
        skipped_count=len(skipped),
        settings=settings,
        cost=cost,
        total_scale=total_scale,
        rate_scale=rate_scale,
        audits=audits,
        audit_scale=NatScale.fitting([found.sums for found in audits.values()], digits=4),
        document_scale=NatScale.fitting(corpus.value_KD, digits=4),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")


def _finite(step_T: Ints, loss_T: Floats) -> tuple[Ints, Floats]:
    measured = np.isfinite(loss_T.astype(np.float64))
    return step_T[measured], loss_T[measured].astype(np.float64)


def _fall(loss: Floats) -> Fall | None:
    if len(loss) < 2:
        return None
    over = min(max(len(loss) // 20, 1), 50)
    return Fall(first=float(loss[0]), last=float(loss[-over:].mean()), over=over)


def _extremes(by_group: Totals) -> list[tuple[int, int]]:
    """The best and the worst group per token, per target."""
    rate_KG = by_group.per_1000_tokens(by_group.value_KG)
    return [(int(rate_G.argmax()), int(rate_G.argmin())) for rate_G in rate_KG]


def _pictures(
    corpus: Corpus,
    by_group: Totals,
    total_scale: NatScale,
    rate_scale: NatScale,
    history: Dataset,
    step_T: Ints,
    losses: list[tuple[Ints, Floats]],
    skipped: Ints,
) -> dict[str, list[Picture]]:
    """By section of the page, in the order of the targets."""
    rate_KG, rate_error_KG = (by_group.per_1000_tokens(x) for x in (by_group.value_KG, by_group.error_KG))
    unit_scale = NatScale.fitting(np.quantile(corpus.value_KN, [0.005, 0.995], axis=1))
    largest_first = np.argsort(-np.abs(by_group.value_KG).max(axis=0), kind="stable")
    named = sorted(largest_first[: pictures.LINES].tolist())
    value_KGT = value_over_training(corpus, history, step_T)
    rate_unit, total_unit = f"{rate_scale.unit} per 1,000 tokens", f"{total_scale.unit} in total"
    groups, training, spread = [], [], []
    for k, target in enumerate(_names(corpus.targets)):
        rate = pictures.group_bars(corpus.groups, rate_KG[k], rate_error_KG[k], rate_scale)
        total = pictures.group_bars(corpus.groups, by_group.value_KG[k], by_group.error_KG[k], total_scale)
        lines = pictures.cumulated_lines(step_T, corpus.groups, value_KGT[k], named, total_scale)
        groups += [Picture(target, rate_unit, rate), Picture(target, total_unit, total)]
        training.append(Picture(target, f"{total_scale.unit}, cumulated", lines))
        histogram = pictures.histogram(corpus.unit, corpus.value_KN[k], unit_scale)
        spread.append(Picture(target, f"number of {corpus.unit}s", histogram))
    measured = [pair for pair in zip(_names(corpus.targets), losses, strict=True) if len(pair[1][0])]
    loss = []
    if measured:
        lines = pictures.loss_lines([name for name, _ in measured], [line for _, line in measured], skipped)
        loss = [Picture(None, "validation loss, nats per token", lines)]
    return {"groups": groups, "training": training, "spread": spread, "loss": loss}


def _audit_pictures(audits: dict[str, Audit]) -> list[Picture]:
    scale = NatScale.fitting([nats for found in audits.values() for nats in (*found.predicted_A, *found.actual_A)])
    return [
        Picture(name, f"fall of the loss in an update, {scale.unit}", pictures.audit_pairs(found, scale))
        for name, found in zip(_names(list(audits)), audits.values(), strict=True)
    ]


def _names(targets: list[str]) -> list[str]:
    return [target or "the validation set" for target in targets]


def _template(name: str) -> str:
    return files("hf_datashapley.report").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
