"""The dataset card: what was valued and how, how to load it and join it with the data, what its licence is.

Words and order are those of `card.md`, a packaged template; here its blanks are filled in. Names of groups and targets
come from anywhere, so what stands in a table is escaped. The same tables give the same card, to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from datasets import Dataset
from huggingface_hub import DatasetCardData

from ..ledger.layout import loss_columns
from .markdown import cell, code, line, link, table
from .repo import TAG
from .source import Source
from .tables import Tables, arrow


GROUPS_SHOWN = 20
IDS_SHOWN = 10
UNITS = {"sample": "row", "document": "document", "token": "token (or document, where tokens have no rows)"}
ROWS = {
    "values": "unit",
    "history": "update and unit in it",
    "audit": "audited update and target",
    "groups": "group",
}
# Whether the targets came late (`LateValues`).
MEASURED = {
    False: "measured while the model trained",
    True: "computed when it had been trained, from the gradients that the run had stored",
}
ORDERS = {
    "first": "to first order in each step: they rank units; their sums overstate long steps",
    "second": "to second order in each step: their sums come near what the units did to the loss at moderate steps",
    "path": "along each step's path: their sums are what the units' gradients did to the loss",
}
KEYS = {
    "sample": "`sample_id` is the row's id in the training data{numbered}.",
    "document": "`document_id` is the document's; one that goes on in another row (`sample_id`) is listed for each.",
    "token": "`position` is the label's place in its row (`sample_id`), -1 for all tokens of a document together.",
}


def write_card(
    tables: Tables,
    repo_id: str,
    source: Source,
    license: dict[str, Any],
    model_id: str | None,
    pictures: Sequence[str],
) -> str:
    """README.md of the repo, whose `pictures` are named by their paths in it."""
    settings, unit = tables.manifest["settings"], tables.manifest["unit"]
    training = tables.manifest.get("training", {})
    model = settings.get("model", "a model")
    numbered = ", its number" if training.get("sample_ids") == "row numbers" else ""
    columns = tables.value_columns
    return Template(files(__package__).joinpath("card.md").read_text(encoding="utf-8")).substitute(
        metadata=metadata(tables, repo_id, source, license),
        title=cell(f"Values of the training data of {model_id or model}"),
        unit=UNITS[unit],
        model=cell(model) if model_id is None else link(model_id, "/"),
        measured=MEASURED["late" in tables.manifest],
        facts=table(facts(tables, source, model_id)),
        loading=loading(tables, repo_id, source),
        configs=table((f"`{name}`", ROWS[name], code(columns_of(tables, name))) for name in tables.configs),
        keys=KEYS[unit].format(numbered=numbered),
        values=f"{code(columns)} {'is' if len(columns) == 1 else 'are'}",
        totals=totals(tables),
        groups="" if tables.groups is None else best_and_worst(tables.groups, columns),
        pictures="\n\n".join(f"![{name.split('/')[-1][:-4].replace('_', ' ')}]({name})" for name in pictures),
        audit=audited(tables.audit),
        settings=table((f"`{name}`", shown(value)) for name, value in {**training, **settings}.items()),
        license=licensed(source, license),
    )


def metadata(tables: Tables, repo_id: str, source: Source, license: dict[str, Any]) -> str:
    configs: list[dict[str, Any]] = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*"}]} for name in tables.configs
    ]
    configs[0]["default"] = True
    found = {
        **license,
        **({} if source.dataset is None else {"source_datasets": [source.dataset]}),
        "pretty_name": repo_id.split("/")[-1],
        "tags": [TAG, "data-attribution", "data-valuation", "data-shapley"],
        "configs": configs,
    }
    return DatasetCardData(**found).to_yaml()


def facts(tables: Tables, source: Source, model_id: str | None) -> Iterable[tuple[str, str]]:
    """The first table: what a reader has to know before any number."""
    manifest = tables.manifest
    settings, training = manifest["settings"], manifest.get("training", {})
    if source.dataset is not None:
        at = "" if source.revision is None else f", revision `{cell(source.revision)}`"
        yield "training data", link(source.dataset, "/datasets/") + at
    else:
        yield "training data", "not named"
    parameters = settings.get("parameters")
    size = "" if parameters is None else f", {parameters:,} parameters ({settings['scored_parameters']:,} scored)"
    named = "" if model_id is None else f"{link(model_id, '/')}, "
    yield "model", f"{named}{cell(settings.get('model', 'not known'))}{size}"
    yield "optimizer", described_optimizer(training, settings)
    rate = np.asarray(tables.updates["learning_rate"], dtype=np.float64)
    schedule = training.get("lr_scheduler_type")
    steps = f"from {rate[0]:.3g} over {rate.max():.3g} to {rate[-1]:.3g}"
    yield "learning rate", steps if schedule is None else f"{cell(schedule)}: {steps}"
    order = settings.get("value_order")
    yield "order of the values", "not known" if order is None else f"{order}, {ORDERS[order]}"
    units = arrow(tables.values)
    counted = f"{len(units):,} with values, {int(np.sum(units['tokens'].to_numpy())):,} loss tokens"
    yield "unit", f"{manifest['unit']}: {counted}"
    skipped = int(np.sum(tables.updates["skipped"]))
    yield "updates", f"{len(tables.updates):,}" + (f", {skipped:,} of them skipped, without values" if skipped else "")
    rows = settings.get("validation_rows", {})
    names = [target or "validation" for target in tables.targets]
    yield "targets", ", ".join(cell(n) + (f" ({rows[n]} rows an update)" if n in rows else "") for n in names)
    yield "begun", cell(manifest.get("created", "not known"))


def described_optimizer(training: dict[str, Any], settings: dict[str, Any]) -> str:
    name = training.get("optimizer")
    if settings.get("value_optimizer") == "sgd":
        return f"{cell(name or 'not known')}, valued as if plain SGD with its learning rates had trained"
    return cell(name or "not known")


def loading(tables: Tables, repo_id: str, source: Source) -> str:
    """Three lines: the values, the data, both."""
    unit, columns = tables.manifest["unit"], json.dumps(tables.value_columns)
    key = json.dumps("sample_id" if unit == "sample" else "document_id")
    chosen = f".set_index({key})[{columns}]" if unit == "sample" else f".groupby({key})[{columns}].sum()"
    corpus = "...  # the training data, as pandas"
    if source.dataset is not None:
        given = "" if source.revision is None else f", revision={json.dumps(source.revision)}"
        corpus = f'load_dataset({json.dumps(source.dataset)}, split="train"{given}).to_pandas()'
    numbered = tables.manifest.get("training", {}).get("sample_ids")
    if unit == "sample" and numbered == "row numbers":
        joined = "corpus.join(values)"
    elif unit == "sample" and numbered is not None:
        joined = f"corpus.join(values, on={key})"
    else:
        joined = f"corpus.join(values, on={key})  # without such a column, by the rows' numbers: corpus.join(values)"
    return "\n".join(
        [
            f'values = load_dataset({json.dumps(repo_id)}, "values", split="train").to_pandas(){chosen}',
            f"corpus = {corpus}",
            f"corpus = {joined}",
        ]
    )


def columns_of(tables: Tables, config: str) -> list[str]:
    if config == "history":
        return [*tables.values.column_names, "step"]
    found = {"values": tables.values, "audit": tables.audit, "groups": tables.groups}[config]
    assert found is not None
    return found.column_names


def totals(tables: Tables) -> str:
    """What all units did to each target, beside what its measured loss did."""
    units = arrow(tables.values)
    rows = []
    for target, column, loss in zip(tables.targets, tables.value_columns, loss_columns(tables.targets), strict=True):
        value_U = units[column].to_numpy()
        measured = np.asarray(tables.updates[loss], dtype=np.float64)
        measured = measured[np.isfinite(measured)]
        fall = f"{measured[0]:.4f} to {measured[-1]:.4f}" if len(measured) else "not measured"
        helped = f"{(value_U > 0).mean():.0%} helped, {(value_U < 0).mean():.0%} hurt"
        rows.append((cell(target or "validation"), f"{value_U.sum():+.4g}", helped, fall))
    head = "| target | all values, nats | units | measured loss, first to last update |\n|---|---:|---|---|\n"
    return head + table(rows)


def best_and_worst(groups: Dataset, columns: list[str]) -> str:
    """By the first target; all of them if they are few."""
    found = arrow(groups)
    name, counted = groups.column_names[:2]
    value_GK = np.stack([found[column].to_numpy() for column in columns], axis=1)
    token_G = found["tokens"].to_numpy()
    order = np.argsort(-value_GK[:, 0], kind="stable")
    if len(order) > GROUPS_SHOWN:
        order = np.concatenate([order[: GROUPS_SHOWN // 2], order[-(GROUPS_SHOWN // 2) :]])
    names = found[name].to_pylist()
    members = found[counted].to_pylist()
    rows = [
        (
            cell("unknown" if names[g] is None else str(names[g])),
            f"{members[g]:,}",
            f"{token_G[g]:,}",
            *(f"{value:+.4g}" for value in value_GK[g]),
        )
        for g in order
    ]
    head = [cell(name), counted, "tokens", *(f"{cell(column)}, nats" for column in columns)]
    told = "" if len(order) == len(names) else f"\n\nThe best and the worst of {len(names):,}; all are in `groups`."
    return f"{line(head)}\n|---|{'---:|' * (len(head) - 1)}\n{table(rows)}{told}"


def audited(audit: Dataset) -> str:
    """What values say that the audited updates did, beside what they did."""
    if not len(audit):
        return "No update of this run was audited: how nearly its values add up was not measured (`audit_steps=0`)."
    found = arrow(audit)
    target_A = np.asarray(found["target"].to_pylist())
    predicted_A, actual_A = found["predicted"].to_numpy(), found["actual"].to_numpy()
    rows = []
    for target in dict.fromkeys(target_A.tolist()):
        own = target_A == target
        predicted, actual = predicted_A[own], actual_A[own]
        size = np.abs(actual).sum()
        missed = f"{np.abs(predicted - actual).sum() / size:.1%}" if size else "-"
        rows.append((cell(target), str(own.sum()), f"{predicted.sum():+.4g}", f"{actual.sum():+.4g}", missed))
    head = (
        "| target | audited updates | loss taken away by the values, nats | as measured | mean gap of an update |\n"
        "|---|---:|---:|---:|---:|\n"
    )
    explained = (
        "At these updates the loss was measured before and after, on the rows that they were scored against, and held "
        "against the sum of the values (and what momentum and weight decay carried). The gap is the summed magnitude "
        "of the differences over that of the measured changes. An audit verifies the sum of an update's values, not "
        "how it is split.\n\n"
    )
    return explained + head + table(rows)


def licensed(source: Source, license: dict[str, Any]) -> str:
    called = license.get("license_name") or license.get("license")
    if source.dataset is None:
        return "The values derive from data that are not named here, and no licence is given for them."
    origin = link(source.dataset, "/datasets/")
    if called is None:
        return f"The values derive from {origin}, whose card says no licence; none is given for the values."
    names = called if isinstance(called, list) else [called]
    return f"The values derive from {origin} and inherit its licence: {', '.join(cell(str(name)) for name in names)}."


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return cell(", ".join(f"{key}: {number}" for key, number in value.items()))
    if isinstance(value, list):
        more = f" and {len(value) - IDS_SHOWN:,} more" if len(value) > IDS_SHOWN else ""
        return cell(", ".join(map(str, value[:IDS_SHOWN])) + more)
    return cell(str(value))
