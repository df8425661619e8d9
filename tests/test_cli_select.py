"""`datashapley select`: what it writes and says, and settings from files, as every command reads them."""

import json
from fractions import Fraction

import datasets
import pytest
from datasets import Dataset, load_from_disk
from ledger_rows import Piece, Visit, write_ledger
from published import publish

from hf_datashapley import select
from hf_datashapley.cli import demo, report
from hf_datashapley.cli import select as command
from hf_datashapley.cli.config_files import parse
from hf_datashapley.cli.main import main
from hf_datashapley.cli.report import ReportConfig
from hf_datashapley.demo.config import DemoConfig


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten samples, of which the last was never trained on; two targets. The corpus in three forms."""
    monkeypatch.chdir(tmp_path)
    visits = [Visit(1, n, [Piece(0, 0, [[Fraction(n - 4, 8), Fraction(4 - n, 8)]] * (n + 1))]) for n in range(9)]
    write_ledger(tmp_path / "out" / "values", visits, "sample", ["code", "prose"])
    corpus = Dataset.from_dict({"text": [f"row {n}" for n in range(10)], "source": list("aabbccddee")})
    corpus.save_to_disk("rows")
    corpus.to_parquet("rows.parquet")
    corpus.to_json("rows.jsonl")
    return tmp_path


def texts(path):
    found = Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else load_from_disk(str(path))
    assert found.column_names == ["text", "source", "value"]
    return found["text"][:]


@pytest.mark.parametrize(
    ("source", "options", "kept"),
    [
        ("rows", "--target code --drop_negative", "456789"),
        ("rows.jsonl", "--target code --drop-negative --unvisited drop", "45678"),
        ("rows.parquet", "--target prose --keep-fraction 0.33 --output new/curated.parquet", "0129"),
        ("rows", "--target code --min_value=-0.3 --unvisited drop --per_token", "2345678"),
        ("rows", "--target code --by source --keep_fraction 0.4 --output curated", "6789"),
    ],
)
def test_what_is_written(folder, capsys, source, options, kept):
    assert main(["select", "out", "--dataset", source, *options.split()]) == 0
    output = options.split("--output ")[1] if "--output" in options else "out/curated"
    assert texts(folder / output) == [f"row {n}" for n in kept]
    said = capsys.readouterr().out
    assert said.startswith(f"kept {len(kept)} of 10 rows") and said.endswith(f"\n{output}\n")
    assert "1 rows were never trained on" in said and "\nsource" in said


def test_the_function_says_the_same(folder, capsys):
    assert main(["select", "out", "--dataset", "rows", "--target", "code", "--keep_fraction", "0.5"]) == 0
    found = select("out", load_from_disk("rows"), target="code", keep_fraction=0.5)
    assert found.dataset.to_dict() == load_from_disk("out/curated").to_dict()
    assert capsys.readouterr().out == f"{found.summary}\n\nout/curated\n"


def test_of_a_published_run(folder, capsys):
    publish(folder / "out" / "values", folder / "copy")
    arguments = ["--dataset", "rows", "--target", "code", "--drop_negative"]
    assert main(["select", "copy", *arguments, "--output", "a"]) == main(["select", "out", *arguments]) == 0
    assert texts(folder / "a") == texts(folder / "out" / "curated")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere --dataset rows --drop_negative --output a", "nowhere holds no ledger of values"),
        ("out --drop_negative", "--dataset is missing"),
        ("me/values --dataset rows --drop_negative", "--output is missing, and me/values is no folder"),
        ("me/values --dataset rows --drop_negative --output a", "me/values: its config 'values' cannot be loaded"),
        ("out --dataset rows --target code", "none of drop_negative, keep_fraction and min_value"),
        ("out --dataset rows --drop_negative", "target: this run has values for code, prose"),
        ("out --dataset rows2 --drop_negative", "--dataset rows2: there is no such file or folder"),
        ("out --dataset me/rows --drop_negative", "--dataset me/rows is no file or folder"),
        ("out --dataset rows --drop_negative --target code --output rows", "rows is there already"),
        ("out --dataset rows --drop_negative --target code --output a.csv", "ends in .parquet"),
        ("out --dataset rows --config a.toml", "--config a.toml: give a file that ends in .yaml"),
    ],
)
def test_errors_are_one_line(folder, capsys, arguments, message):
    before = sorted(folder.rglob("*"))
    assert main(["select", *arguments.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("datashapley select: ") and message in said[0]
    assert sorted(folder.rglob("*")) == before
    with pytest.raises((ValueError, OSError)):
        main(["select", *arguments.split(), "--debug"])


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["select", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--keep_fraction" in said and "--config FILE" in said and "datashapley select out --dataset" in said


CONFIGS = {
    "select.yaml": "dataset: rows\nkeep-fraction: 5e-1\ntarget: prose\nper_token: false\noutput: null\n",
    "select.json": json.dumps({"dataset": "rows", "keep_fraction": 0.5, "target": "prose"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_from_a_file(folder, name):
    (folder / name).write_text(CONFIGS[name])
    assert main(["select", "out", "--config", name]) == 0
    assert texts(folder / "out" / "curated") == [f"row {n}" for n in (0, 1, 2, 3, 9)]
    above = ["--target", "code", "--output", "a", "--keep_fraction", "0.3"]
    assert main(["select", "out", f"--config={name}", *above]) == 0
    assert texts(folder / "a") == [f"row {n}" for n in (6, 7, 8, 9)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.yaml",
            "datasets: rows",
            "a.yaml has 'datasets', which is no option of this command; did you mean dataset?",
        ),
        ("a.yaml", "qqq: rows", "which is no option of this command; choose of dataset, split"),
        ("a.yaml", "- rows", "a.yaml is a list: give options by their names"),
        ("a.yaml", "a: [", "a.yaml is no YAML: while parsing"),
        ("a.json", "{", "a.json is no JSON: Expecting"),
    ],
)
def test_files_that_are_no_settings(folder, capsys, name, text, message):
    (folder / name).write_text(text)
    assert main(["select", "out", "--config", name]) == 2
    assert message in capsys.readouterr().err.splitlines()[0]
    assert main(["select", "out", "--config", "missing.yaml"]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_a_file_has_the_same_types_as_the_command_line(folder, capsys):
    (folder / "a.yaml").write_text("keep_fraction: most")
    with pytest.raises(SystemExit) as ended:
        main(["select", "out", "--config", "a.yaml"])
    assert ended.value.code == 2 and "--keep_fraction" in capsys.readouterr().err


def test_every_command_reads_files(tmp_path):
    """Lists, flags, numbers that begin with a minus; an empty file."""
    (tmp_path / "demo.yaml").write_text("targets: [wiki, law]\nseed: 3\nupdates: 7\n")
    found = parse(demo.parser(), DemoConfig, ["--config", str(tmp_path / "demo.yaml"), "--updates", "9"])
    assert DemoConfig(**found) == DemoConfig(targets=["wiki", "law"], seed=3, updates=9)
    (tmp_path / "report.yml").write_text("")
    found = parse(report.parser(), ReportConfig, ["out", "--config", str(tmp_path / "report.yml")])
    assert found == {"run": "out", **vars(ReportConfig())}
    (tmp_path / "select.yaml").write_text("min_value: -1.0e-5\ndrop_negative: true\n")
    found = parse(command.parser(), command.SelectConfig, ["--config", str(tmp_path / "select.yaml"), "out"])
    assert found["min_value"] == -1e-5 and found["drop_negative"] is True and found["run"] == "out"
