"""Runs that push: values go along with checkpoints and with the model, whose card links to them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from datasets import Dataset, load_dataset
from hub_client import TOKEN, Client
from hub_server import Fault
from models import build, collate, dataset, text_rows
from test_hub import card_of, load, told, write

from hf_datashapley import ShapleyConfig, ShapleyTrainer, load_value_history, load_values
from hf_datashapley.cli.main import main


def made(folder: Path, **settings: Any) -> ShapleyTrainer:
    """4 updates, a checkpoint after every second."""
    rows = dataset(text_rows(8), ids=range(5, 13)).add_column("part", list("abcdabcd"))
    arguments = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "hub_model_id": "me/tiny",
        **settings,
    }
    return ShapleyTrainer(
        build("gpt2", layers=1),
        ShapleyConfig(output_dir=str(folder), **arguments),
        train_dataset=rows,
        validation_dataset=dataset(text_rows(4, seed=2)),
        data_collator=collate,
    )


def train(folder: Path, finish: bool = True, **settings: Any) -> str:
    """The model card."""
    trainer = made(folder, **{"push_to_hub": True, **settings})
    trainer.train()
    if finish:
        trainer.push_to_hub()
    return (folder / "README.md").read_text() if finish else ""


def messages(client: Client, repo_id: str) -> list[str]:
    return [commit.message for commit in client.hub.dataset(repo_id).branches["main"]]


def test_values_go_along_with_checkpoints(client, tmp_path):
    """And are all there at the end, linked from the model's card, the local one and the pushed one."""
    card = client.run(train, tmp_path)
    assert messages(client, "me/tiny-values")[1:] == ["Values of 2 updates", "Values of 4 updates"]
    assert client.run(load, "me/tiny-values", "values") == told(load_values(tmp_path / "values"))
    assert client.run(load, "me/tiny-values", "history") == told(load_value_history(tmp_path / "values"))
    assert card.count("## Values of the training data") == 1
    assert f"[me/tiny-values]({client.hub.url}/datasets/me/tiny-values)" in card
    assert client.hub.model("me/tiny").files()["README.md"].decode() == card
    metadata, text = card_of(client, "me/tiny-values")
    assert f"[me/tiny]({client.hub.url}/me/tiny), GPT2LMHeadModel" in text
    assert "| optimizer | adamw&#95;torch" in text and "linear: from 0.01 over 0.01 to 0.0025" in text
    assert "license" not in metadata and "no licence is given" in text


@pytest.mark.parametrize(
    "strategy, pushed", [("end", []), ("checkpoint", ["2", "4"]), ("all_checkpoints", ["2", "4"])]
)
def test_hub_strategy(client, tmp_path, strategy, pushed):
    """ "end": when the model is pushed, and not before."""
    client.run(train, tmp_path, finish=False, hub_strategy=strategy, hub_always_push=True)
    found = messages(client, "me/tiny-values") if pushed else [""]
    assert [message.split()[-2] for message in found[1:]] == pushed
    assert (("dataset", "me/tiny-values") in client.hub.repos) == bool(pushed)


def test_settings_of_the_push(client, tmp_path):
    client.hub.add("dataset", "me/corpus", {"README.md": b"---\nlicense: odc-by\n---\n"})
    client.run(
        train,
        tmp_path,
        hub_strategy="end",
        hub_values_id="measured",
        hub_private_repo=True,
        source_dataset="me/corpus",
        source_revision="main",
    )
    assert client.hub.dataset("me/measured").private
    metadata, text = card_of(client, "me/measured")
    assert metadata["license"] == "odc-by" and metadata["source_datasets"] == ["me/corpus"]
    assert "[me/corpus]" in text and "revision `main`" in text


def test_failures_in_the_background_do_not_end_the_run(client, tmp_path):
    client.hub.faults.append(Fault("/api/datasets/me/tiny-values/commit", 403, times=100))
    found = client.tell(train, tmp_path, finish=False)
    assert found.error is None
    assert "Values were not pushed, and lie where they lay: me/tiny-values: the token may not write" in found.text
    assert len(load_values(tmp_path / "values"))
    assert messages(client, "me/tiny-values") == ["initial commit"]


def test_what_cannot_be_pushed_is_refused_before_the_run(client, tmp_path):
    client.hub.add("dataset", "me/tiny-values", {"corpus.parquet": b"PAR1"})
    message = client.refused(train, tmp_path)
    assert "me/tiny-values is a dataset of another kind (it holds corpus.parquet" in message
    client.hub.add("dataset", "me/tiny-values", {})
    message = client.refused(train, tmp_path, hub_private_repo=True)
    assert "private=True: me/tiny-values is public already" in message
    assert "source_dataset='me/gone'" in client.refused(train, tmp_path, source_dataset="me/gone")
    assert not (tmp_path / "values").exists()


def test_a_token_among_the_arguments_is_warned_of(client, tmp_path):
    """`Trainer` saves them, and pushes what it saves."""
    found = client.tell(train, tmp_path, finish=False, hub_strategy="end", hub_token=TOKEN)
    assert found.error is None and "hub_token: Trainer writes its arguments into training_args.bin" in found.text
    saved = (tmp_path / "checkpoint-4" / "training_args.bin").read_bytes()
    assert TOKEN.encode() in saved  # else the warning may go


def test_settings_without_a_push(tmp_path):
    with pytest.raises(ValueError, match="hub_values_id='me/x' is for runs that push: set push_to_hub=True"):
        made(tmp_path, hub_values_id="me/x")
    with pytest.raises(ValueError, match="source_license='mit' is that of a dataset: name it by source_dataset"):
        made(tmp_path, source_license="mit")


def push_by_hand(folder: Path) -> tuple[str, list[dict[str, Any]], str, str]:
    """Before there is a model card, and after; with the run's own column."""
    trainer = made(folder, save_strategy="no", source_dataset="me/corpus", source_license="mit", hub_token=TOKEN)
    trainer.train()
    pushed = trainer.push_values_to_hub("values", by="part", private=True)
    assert pushed is not None
    trainer.create_model_card()
    first = (folder / "README.md").read_text()
    trainer.push_values_to_hub("me/others", by="part")
    return pushed.repo_url.repo_id, list(trainer.values(by="part")), first, (folder / "README.md").read_text()


def test_push_values_to_hub_of_a_trainer(client, tmp_path):
    """A run that pushes nothing by itself: neither the model."""
    repo_id, groups, first, second = client.run(push_by_hand, tmp_path)
    assert repo_id == "me/values" and client.hub.dataset("me/values").private
    assert client.run(load, "me/values", "values") == told(load_values(tmp_path / "values"))
    assert client.run(load, "me/others", "groups")[1] == groups and [row["part"] for row in groups] == list("abcd")
    assert card_of(client)[0]["license"] == "mit"
    assert first.count("datasets/me/values)") == 1 and "me/others" not in first
    assert second.count("datasets/me/others)") == 1 and "me/values" not in second
    assert {kind for kind, _ in client.hub.repos} == {"dataset"}


# The command line


def command(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with patch.dict("sys.modules", {"matplotlib": None, "jinja2": None}):
            code = main(["push", *arguments])
    return code, out.getvalue(), err.getvalue()


def test_push_from_the_command_line(client, tmp_path):
    """With groups of samples, from a file; the model card beside the ledger links to it."""
    run = write(tmp_path / "run")
    (run / "README.md").write_text("---\ntags:\n- generated_from_trainer\n---\n\n# run\n")
    rows = tmp_path / "rows.parquet"
    Dataset.from_dict({"sample_id": range(9), "part": list("abcabcabc")}).to_parquet(rows)
    arguments = [str(run), "me/values", "--private", "--dataset", str(rows), "--group_column", "part"]
    code, out, err = client.run(command, *arguments, "--model_id", "me/tiny")
    assert (code, err) == (0, "")
    url = f"{client.hub.url}/datasets/me/values"
    assert out == f"{url}\nThe model card in {run} links to it\n"
    assert "# run\n\n## Values of the training data\n\n" in (run / "README.md").read_text()
    assert url in (run / "README.md").read_text()
    assert client.hub.dataset("me/values").private and "[me/tiny]" in card_of(client)[1]
    expected = load_values(run / "values", by="part", dataset=load_dataset("parquet", data_files=str(rows))["train"])
    assert client.run(load, "me/values", "groups") == told(expected)


def test_groups_of_documents_and_a_readme_of_another_kind(client, tmp_path):
    run = write(tmp_path / "run", "document")
    (run / "README.md").write_text("# Notes\n")
    corpus = tmp_path / "corpus.jsonl"
    Dataset.from_dict({"source": list("xyzxyzxyz")}).to_json(corpus)
    arguments = (str(run / "values"), "values", "--documents", str(corpus), "--group_column", "source")
    assert client.run(command, *arguments)[0] == 0
    assert (run / "README.md").read_text() == "# Notes\n"
    expected = load_values(run / "values", by=dict(enumerate("xyzxyzxyz")))
    groups = client.run(load, "me/values", "groups")[1]
    assert [list(row.values()) for row in groups] == [list(row.values()) for row in expected]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["you/values"], "datashapley push: you/values: the token may not write there"),
        (["me/values", "--group_column", "part"], "name the file that has this column, by --dataset or --documents"),
        (["me/values", "--dataset", "x.parquet"], "--dataset x.parquet: name the column to sum over"),
        (["me/values", "--sample_id_column", "id"], "'id' is a column of --dataset: name the file, too"),
        (["me/values", "--dataset", "x", "--documents", "y"], "give one of them"),
        (["me/values", "--source_license", "mit"], "source_license='mit' is that of a dataset"),
    ],
)
def test_errors_are_one_line(client, tmp_path, arguments, message):
    code, out, err = client.run(command, str(write(tmp_path)), *arguments)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err
    assert err.endswith("\n(--debug shows where)\n")


def test_no_option_takes_a_token(capsys):
    """Which everyone on the machine could read."""
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    help = capsys.readouterr().out
    assert "hf auth login" in help and "--token" not in help and "--source_dataset" in help
