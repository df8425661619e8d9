"""Values on the Hub: what is pushed is what was measured, all of it or nothing, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from hub_client import TOKEN, Client
from hub_server import Fault

from hf_datashapley import load_audit, load_value_history, load_values, push_values_to_hub
from hf_datashapley.hub import tables
from hf_datashapley.ledger import Ledger
from hf_datashapley.ledger.layout import Part, unit_keys
from hf_datashapley.values.update import UpdateAudit, UpdateValues


def write(
    folder: Path, unit: str = "sample", targets: tuple[str, ...] = ("",), first: int = 1, last: int = 5, **told: Any
) -> Path:
    """A run's ledger of random values, every other update audited; from `first` on, it goes on."""
    settings = {
        "unit": unit,
        "settings": {"model": "TinyGPT", "parameters": 9, "scored_parameters": 7, "value_order": "path"},
        "training": {"optimizer": "adamw_torch", "lr_scheduler_type": "linear", "sample_ids": "column"},
        **told,
    }
    ledger = Ledger(folder / "values", list(targets), settings, after=first - 1)
    for step in range(first, last + 1):
        draw = random.Random(step)
        keys = sorted({tuple(draw.randrange(9) for _ in unit_keys(unit)) for _ in range(7)})
        audit = torch.tensor([[draw.gauss(0, 1) for _ in targets] for _ in range(3)], dtype=torch.float64)
        ledger.append(
            UpdateValues(
                step=step,
                ids={name: torch.tensor([key[k] for key in keys]) for k, name in enumerate(unit_keys(unit))},
                tokens=torch.tensor([draw.randrange(1, 9) for _ in keys]),
                values=torch.tensor([[draw.gauss(0, 1) for _ in targets] for _ in keys]),
                validation_losses=torch.tensor([3.0 - step / 10] * len(targets)),
                clip=torch.tensor(0.5),
                learning_rate=1e-3 / step,
                skipped=torch.tensor(False),
                finite=torch.tensor(True),
                totals=torch.zeros(4, len(targets), dtype=torch.float64),
                audit=UpdateAudit(*audit) if step % 2 else None,
            )
        )
    ledger.close()
    return folder


# What happens in the other process


def push(run: Path, repo_id: str = "me/values", rows: int = tables.ROWS_PER_SHARD, **settings: Any) -> str:
    """As a plain installation does: pictures take longer than all else."""
    with patch.object(tables, "ROWS_PER_SHARD", rows), patch.dict(sys.modules, {"matplotlib": None, "jinja2": None}):
        return push_values_to_hub(run, repo_id, **settings).oid


def push_with_pictures(run: Path, **settings: Any) -> str:
    return push_values_to_hub(run, "me/values", **settings).oid


def load(repo_id: str, config: str, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Types and rows."""
    loaded = load_dataset(repo_id, config, split="train", download_mode="force_redownload", **settings)
    return loaded.features, list(loaded)


def told(table: Dataset) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return table.features, list(table)


def card_of(client: Client, repo_id: str = "me/values") -> tuple[dict[str, Any], str]:
    """Metadata and text."""
    _, metadata, text = client.hub.dataset(repo_id).files()["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


@pytest.mark.parametrize("unit, targets", [("sample", ("",)), ("document", ("a b", "ç|d")), ("token", ("math",))])
def test_what_is_loaded_is_what_was_measured(client, tmp_path, unit, targets):
    """Rows and types, in shards of a few rows each, whatever the unit; groups, too, with one that is not known."""
    run = write(tmp_path, unit, targets)
    by = {index: None if index == 3 else f"part {index % 3}" for index in range(9)}
    client.run(push, run, rows=20, by=by)
    files = [path for path in client.hub.dataset("me/values").files() if path.startswith("history/")]
    assert len(files) == 3  # of 2 updates each: about 7 rows an update
    assert client.run(load, "me/values", "values") == told(load_values(run / "values"))
    assert client.run(load, "me/values", "history") == told(load_value_history(run / "values"))
    assert client.run(load, "me/values", "audit") == told(load_audit(run / "values"))
    assert client.run(load, "me/values", "groups") == told(load_values(run / "values", by=by))


def load_default(repo_id: str) -> list[dict[str, Any]]:
    return list(load_dataset(repo_id, split="train"))


def test_configurations_that_the_viewer_finds(client, tmp_path):
    """Only those that have rows, the values first of all."""
    run = write(tmp_path, last=1)
    (audit,) = (run / "values").glob("audit-*")
    audit.unlink()
    for part in (run / "values").glob("updates-*"):
        table = tables.pq.read_table(part)
        tables.pq.write_table(table.replace_schema_metadata({b"audited": b"no"}), part)
    client.run(push, run)
    metadata, text = card_of(client)
    assert metadata["configs"] == [
        {
            "config_name": "values",
            "data_files": [{"split": "train", "path": "values/train-*"}],
            "default": True,
        },
        {"config_name": "history", "data_files": [{"split": "train", "path": "history/train-*"}]},
    ]
    assert "No update of this run was audited" in text
    assert client.run(load_default, "me/values") == list(load_values(run / "values"))


def test_pushing_again_changes_nothing(client, tmp_path):
    """Pictures are the same, too."""
    run = write(tmp_path)
    first = client.run(push_with_pictures, run)
    asked = len(client.hub.requests)
    assert client.run(push_with_pictures, run) == first
    assert not any("/commit/" in request or request.startswith("PUT") for request in client.hub.requests[asked:])


def test_a_run_that_goes_on_is_brought_up_to_date(client, tmp_path):
    """Shards of its first updates are not sent again; what has gone is gone from the repo, and nothing of others'."""
    run = write(tmp_path, last=4)
    client.run(push, run, rows=20, by={index: index for index in range(9)})
    repo = client.hub.dataset("me/values")
    files = dict(repo.branches["main"][-1].files)
    repo.commit("main", "someone's notes", {**files, "notes.txt": files["README.md"]})
    history = [content for path, content in repo.files().items() if path.startswith("history/")]
    write(tmp_path, first=5, last=8)
    asked = len(client.hub.requests)
    client.run(push, run, rows=20)
    assert client.run(load, "me/values", "history") == told(load_value_history(run / "values"))
    after = repo.files()
    assert [after[f"history/train-{number:05d}-of-00004.parquet"] for number in range(2)] == history
    assert (
        sum(request.startswith("PUT /lfs") for request in client.hub.requests[asked:]) <= 4
    )  # two shards of the history, values, audit
    assert "notes.txt" in after and not any(path.startswith("groups/") for path in after)
    assert not any("of-00002" in path for path in after)


def test_to_step(client, tmp_path):
    run = write(tmp_path)
    client.run(push, run, to_step=3)
    assert client.run(load, "me/values", "values") == told(load_values(run / "values", 1, 3))
    assert client.run(load, "me/values", "audit") == told(load_audit(run / "values", 1, 3))


# The card


def test_card(client, tmp_path):
    """What a reader has to know, without which the numbers mean nothing."""
    run = write(tmp_path, targets=("math", "code"))
    client.run(
        push_with_pictures,
        run,
        source_dataset="me/corpus",
        source_revision="v1",
        source_license="cc-by-4.0",
        model_id="me/tiny",
    )
    metadata, text = card_of(client)
    assert metadata["license"] == "cc-by-4.0" and metadata["source_datasets"] == ["me/corpus"]
    assert "hf_datashapley" in metadata["tags"]
    url = client.hub.url
    values, audit = load_values(run / "values").to_pandas(), load_audit(run / "values").to_pandas()
    for part in (
        f"[me/corpus]({url}/datasets/me/corpus), revision `v1`",
        f"[me/tiny]({url}/me/tiny), TinyGPT, 9 parameters (7 scored)",
        "| optimizer | adamw&#95;torch |",
        "| learning rate | linear: from 0.001 over 0.001 to 0.0002 |",
        "| order of the values | path, along each step's path",
        f"| unit | sample: {len(values)} with values, {values['tokens'].sum()} loss tokens |",
        "| targets | math, code |",
        f"| math | {values['value_math'].sum():+.4g} | {(values['value_math'] > 0).mean():.0%} helped",
        f"| code | 3 | {audit[audit.target == 'code'].predicted.sum():+.4g} |",
        "inherit its licence: cc-by-4.0.",
        "eprint = {2406.11011}",
        "eprint = {1904.02868}",
        "`value_math`, `value_code` are in nats",
    ):
        assert part in text, part
    assert not re.search(r"\$[a-z]", text)
    pictures = re.findall(r"!\[[a-z ]+\]\((.*?)\)", text)
    assert pictures == ["pictures/value_over_training.png", "pictures/values.png", "pictures/audit.png"]
    assert all(client.hub.dataset("me/values").files()[path].startswith(b"\x89PNG") for path in pictures)


def test_card_of_late_values(client, tmp_path):
    client.run(push, write(tmp_path, late={"checkpoints": [2, 4]}))
    assert "computed when it had been trained, from the gradients that the run had stored" in card_of(client)[1]


def follow(text: str) -> Any:
    """What the card's example comes to."""
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], names)
    return names["corpus"].to_dict("list")


def push_corpus(rows: dict[str, list[Any]]) -> None:
    Dataset.from_dict(rows).push_to_hub("me/corpus")


@pytest.mark.parametrize("unit, ids", [("sample", "column"), ("sample", "row numbers"), ("document", "column")])
def test_the_three_lines_of_the_card_do_what_they_say(client, tmp_path, unit, ids):
    key = f"{unit}_id"
    run = write(tmp_path, unit, training={"sample_ids": ids})
    corpus = {key: [8, 1, 30, 4, 0, 2, 3, 5, 6, 7], "text": list("abcdefghij")}
    if ids == "row numbers":
        del corpus[key]
    client.run(push_corpus, corpus)
    client.run(push, run, source_dataset="me/corpus")
    joined = client.run(follow, card_of(client)[1])
    rows = list(load_values(run / "values"))
    valued = {row[key]: sum(other["value"] for other in rows if other[key] == row[key]) for row in rows}
    expected = [valued.get(index) for index in corpus.get(key, range(10))]
    assert joined["text"] == corpus["text"]
    assert [None if value != value else value for value in joined["value"]] == pytest.approx(expected)


def test_names_from_anywhere_are_no_markup(client, tmp_path):
    run = write(tmp_path, targets=("<b>|x",))
    names = [
        "a|b",
        "<script>alert(1)</script>",
        "line\nbreak | --- ",
        "[x](http://y)",
        "`$model` $$",
        "",
        "\\|",
        "~~",
        "x",
    ]
    client.run(push, run, by=dict(enumerate(names)))
    text = card_of(client)[1]
    shown = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"<(?!/?code>)|\]\(http://y\)|`\$model", shown)
    assert "<code>value&#95;&lt;b&gt;&#124;x</code>" in shown
    (table,) = re.findall(r"^\| group \|.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)
    assert {line.count("|") for line in table.splitlines()} == {5}


@pytest.mark.parametrize(
    "card, settings, license",
    [
        (b"---\nlicense: odc-by\n---\n", {}, {"license": "odc-by"}),
        (b"---\nlicense: odc-by\n---\n", {"source_license": "mit"}, {"license": "mit"}),
        (
            b"---\nlicense: other\nlicense_name: theirs\nlicense_link: LICENSE\n---\n",
            {},
            {"license": "other", "license_name": "theirs", "license_link": "LICENSE"},
        ),
        (b"none said", {}, {}),
    ],
)
def test_the_licence_is_the_source_s(client, tmp_path, card, settings, license):
    client.hub.add("dataset", "me/corpus", {"README.md": card})
    client.run(push, write(tmp_path), source_dataset="me/corpus", **settings)
    metadata, text = card_of(client)
    assert {name: metadata[name] for name in metadata if name.startswith("license")} == license
    said = license.get("license_name") or license.get("license")
    assert (f"inherit its licence: {said}" if said else "whose card says no licence") in text


def test_a_plain_installation_pushes_without_pictures(client, tmp_path):
    """And takes away those of an earlier push, which would be of other values."""
    run = write(tmp_path)
    client.run(push_with_pictures, run, by=["a", None] * 5)
    assert sum(path.startswith("pictures/") for path in client.hub.dataset("me/values").files()) == 4
    client.run(push, run)
    assert not any(path.startswith("pictures/") for path in client.hub.dataset("me/values").files())
    assert "![" not in card_of(client)[1] and "Who helped" in card_of(client)[1]


# What goes wrong on the way


COMMIT, LARGE = r"POST /api/datasets/me/values/commit/main", "PUT /lfs/"
FAULTS = {
    "busy at the commit": [Fault(COMMIT, 503, times=2)],
    "busy at the card": [Fault("POST /api/validate-yaml", 502)],
    "busy at the beginning": [Fault("GET /api/datasets/me/values$", 500), Fault("POST /api/repos/create", 503)],
    "busy at a large file": [Fault(LARGE, 503, times=2)],
    "too many requests": [Fault(COMMIT, 429)],
    "another commit at the same time": [Fault(COMMIT, 409)],
    "cut off in the midst of a file": [Fault(LARGE, "drop", times=3)],
    "cut off in the midst of several files": [Fault(LARGE, "drop", times=5)],
    "cut off in the midst of the commit": [Fault(COMMIT, "drop")],
    "no answer to the commit": [Fault(COMMIT, "drop answer")],
    "no answer to the creation": [Fault("POST /api/repos/create", "drop answer")],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_half_way_is_tried_again(client, tmp_path, name):
    """Until the repo holds what it should, by one commit, which a lost answer does not double."""
    run = write(tmp_path)
    client.hub.faults[:] = [Fault(fault.pattern, fault.what, fault.times) for fault in FAULTS[name]]
    found = client.tell(push, run)
    assert found.error is None, found.text
    assert found.waited and max(found.waited) <= 8
    assert not any(fault.times for fault in client.hub.faults)
    assert len(client.hub.dataset("me/values").branches["main"]) == 2
    assert client.run(load, "me/values", "values") == told(load_values(run / "values"))


@pytest.mark.parametrize("pattern, what", [(COMMIT, 503), (COMMIT, "drop"), (LARGE, "drop"), (LARGE, 503)])
def test_a_failure_that_stays_leaves_the_repo_as_it_was(client, tmp_path, pattern, what):
    run = write(tmp_path, last=2)
    client.run(push, run)
    before = dict(client.hub.dataset("me/values").files())
    write(tmp_path, first=3, last=4)
    client.hub.faults.append(Fault(pattern, what, times=10_000))
    asked = len(client.hub.requests)
    found = client.tell(push, run)
    assert isinstance(found.error, ConnectionError) and "in 5 attempts" in str(found.error)
    assert [wait for wait in found.waited if pattern == COMMIT] == ([1, 2, 4, 8] if pattern == COMMIT else [])
    assert len(client.hub.requests) - asked < 300
    assert client.hub.dataset("me/values").files() == before
    client.hub.faults.clear()
    client.run(push, run)
    assert client.run(load, "me/values", "values") == told(load_values(run / "values"))


def test_what_others_commit_in_between_is_not_lost(client, tmp_path):
    run = write(tmp_path, last=2)
    client.run(push, run)
    write(tmp_path, first=3, last=4)
    repo = client.hub.dataset("me/values")

    def commit_of_another() -> None:
        files = repo.branches["main"][-1].files
        repo.commit("main", "another's", {**files, "notes.txt": files["README.md"]})

    client.hub.faults.append(Fault(COMMIT, commit_of_another))
    client.run(push, run)
    assert "notes.txt" in repo.files()
    assert client.run(load, "me/values", "values") == told(load_values(run / "values"))
    assert [commit.message for commit in repo.branches["main"]][2:] == ["another's", "Values of 4 updates"]


# Whom it belongs to


@pytest.mark.parametrize("status", [400, 401, 403, 404, 503])
@pytest.mark.parametrize("pattern", [COMMIT, LARGE, "GET /api/datasets/me/values$"])
def test_tokens_are_in_no_message(client, tmp_path, status, pattern):
    """Also where the server repeats what it was asked with (`Client` looks for the token in all that is said)."""
    if (status, pattern) == (404, "GET /api/datasets/me/values$"):
        pattern = "POST /api/repos/create"
    client.hub.faults.append(Fault(pattern, status, times=10_000, echo=True))
    message = client.refused(push, write(tmp_path))
    assert message.startswith("me/values: ") and TOKEN not in message
    assert client.hub.faults[0].times < 10_000


def test_a_private_repo_stays_one(client, tmp_path):
    run = write(tmp_path)
    client.run(push, run, private=True)
    assert client.hub.dataset("me/values").private
    client.run(push, run)
    client.run(push, run, private=True)
    assert "private=False: me/values is private already" in client.refused(push, run, private=False)


def test_a_public_repo_gets_nothing_that_should_be_private(client, tmp_path):
    client.hub.add("dataset", "me/values", {})
    assert "private=True: me/values is public already" in client.refused(push, write(tmp_path), private=True)
    assert not client.hub.dataset("me/values").files()


def test_a_branch(client, tmp_path):
    """Made where it is missing; main stays as it was."""
    run = write(tmp_path, last=2)
    client.run(push, run)
    before = client.hub.dataset("me/values").files()
    write(tmp_path, first=3, last=4)
    for _ in range(2):
        client.run(push, run, revision="longer/run")
    assert client.hub.dataset("me/values").files() == before
    assert client.run(load, "me/values", "values", revision="longer/run") == told(load_values(run / "values"))


def test_a_name_without_an_owner_is_one_s_own(client, tmp_path):
    client.run(push, write(tmp_path), "values")
    assert 'load_dataset("me/values", "values"' in card_of(client)[1]


def push_without_token(run: Path) -> str:
    with patch.dict(os.environ):
        del os.environ["HF_TOKEN"]
        return push(run)


REFUSED = {
    "another's": ({"repo_id": "you/values"}, "you/values: the token may not write there"),
    "wrong token": ({"token": "hf_wrong"}, "me/values: the Hub does not accept the token"),
    "a token with a line break": ({"token": f"{TOKEN}\n"}, "the token holds characters that no token has"),
    "a model": ({"repo_id": "me/model"}, "repo_id='me/model' is a model, and values go to a dataset repo"),
    "a corpus": ({"repo_id": "me/corpus"}, "me/corpus is a dataset of another kind (it holds data.parquet"),
    "no name": ({"repo_id": "me/a/b"}, "repo_id='me/a/b' is no name of a repo"),
    "a URL's name": ({"repo_id": "datasets/x"}, "repo_id='datasets/x': leave datasets/ out"),
    "an unknown source": ({"source_dataset": "me/gone"}, "source_dataset='me/gone': the Hub shows no such dataset"),
    "an unknown revision": (
        {"source_dataset": "me/corpus", "source_revision": "v9"},
        "no such dataset with a revision 'v9'",
    ),
    "a revision of nothing": ({"source_revision": "v1"}, "source_revision='v1' is that of a dataset"),
    "no licence": ({"source_dataset": "me/corpus", "source_license": "xyz"}, '"license" must be one of'),
    "no groups": ({"key": "sample_id"}, "dataset, key and id_column are for groups"),
    "too late a step": ({"to_step": 9}, "holds the updates 1 to 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(client, tmp_path, name):
    settings, message = REFUSED[name]
    client.hub.add("model", "me/model", {})
    client.hub.add("dataset", "me/corpus", {"data.parquet": b"PAR1", "README.md": b"---\nlicense: mit\n---\n"})
    assert message in client.refused(push, write(tmp_path), **settings)
    assert set(client.hub.repos) <= {("model", "me/model"), ("dataset", "me/corpus"), ("dataset", "me/values")}
    assert all("README.md" not in repo.files() for key, repo in client.hub.repos.items() if key[1] == "me/values")
    assert client.hub.dataset("me/corpus").files()["data.parquet"] == b"PAR1"


def test_no_token(client, tmp_path):
    assert "pushing needs a token with write access: log in" in client.refused(push_without_token, write(tmp_path))
    assert not client.hub.requests


def test_no_way_to_the_hub(tmp_path):
    """Tests themselves are kept from it."""
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1 keeps this process from the Hub: unset it"):
        push_values_to_hub(write(tmp_path), "me/values", token=TOKEN)


def test_ledgers_that_are_not_ready(client, tmp_path):
    assert "holds no ledger of values" in client.refused(push, tmp_path / "none")
    run = write(tmp_path / "running")
    for path in (run / "values").glob("values-*"):
        path.rename(Part(path.parent, "values", 1, 5, 0, 2).path)
    assert "is not finished: it holds updates up to 5 of some ranks" in client.refused(push, run)
    begun = tmp_path / "begun" / "values"
    begun.mkdir(parents=True)
    (begun / "ledger.json").write_text(json.dumps({"format": 1, "targets": [], "unit": "sample", "settings": {}}))
    assert "holds no update yet" in client.refused(push, begun)
    assert not client.hub.repos


def test_the_server_as_a_command():
    """As an example starts it, which shows what it would push."""
    script = Path(__file__).with_name("hub_server.py")
    with subprocess.Popen([sys.executable, script, "--token", TOKEN], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        asked = Request(f"{url}/api/whoami-v2", headers={"Authorization": f"Bearer {TOKEN}"})
        with urlopen(asked) as answer:
            assert json.load(answer)["name"] == "me"
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"{url}/api/whoami-v2")
        server.terminate()
