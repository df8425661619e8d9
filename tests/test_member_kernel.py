"""Groups scored with the kernel of their members: their scores are sums, by float64 and by fits without groups; what a
kill leaves; and what is refused."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import build, dataset, text_rows
from oracles_attribution import Oracle
from packed_documents import packed_rows, pieces
from test_attribution import FLOAT32, error, estimator, rows_of
from test_feature_store import files
from transformers import default_data_collator

from hf_datashapley import DropoutEnsemble, Influence, Partition, Trak
from hf_datashapley.attribution import store, unit_kernel


LABELS = ["b", "a", "b", "c", "a"]


@pytest.fixture
def model():
    return build("gpt2")


@pytest.fixture
def another(model):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return other


def summed(scores, labels=LABELS):
    names = sorted(set(labels))
    return np.stack([scores[[label == name for label in labels]].sum(0) for name in names])


def given(labels=LABELS, **settings):
    return {"partition": Partition.from_labels(labels), "kernel": "unit", "damping": 0.3, **settings}


@pytest.mark.parametrize("route", ["summed", "batched"])
def test_scores_are_sums_of_float64_ones(monkeypatch, model, route):
    """Rather many entries for their square to be a matrix, so some modules only count."""
    monkeypatch.setattr(unit_kernel, "TOGETHER", 2)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    train, queries = rows_of("gpt2")
    oracle = Oracle(model, [[row] for row in train], queries)
    data = dataset(train), dataset(queries)
    settings = given(route=route, projection_dim=None)
    found = estimator(Influence, model, **settings).fit(data[0]).score(data[1])
    assert error(found, summed(oracle.influence(0.3).numpy())) < FLOAT32
    kernel, q_N = oracle.trak(0.3, "mean")
    found = estimator(Trak, model, **settings).fit(data[0]).score(data[1])
    assert error(found, summed((kernel * q_N[:, None]).numpy())) < FLOAT32
    if route == "summed":
        kernel, q_N = oracle.trak(0.3, "tokens")
        found = estimator(Trak, model, output="tokens", **settings).fit(data[0]).score(data[1])
        assert error(found, summed((kernel * q_N[:, None]).numpy())) < FLOAT32


@pytest.mark.parametrize("output", ["mean", "tokens"])
def test_of_ensembles(model, another, output):
    train, queries = rows_of("gpt2")
    masks = DropoutEnsemble(model, passes=3, p=0.1, forward_only=True)
    for members in ([model, another], masks):
        settings = {"projection_dim": 64, "output": output, "damping": 0.3}
        single = estimator(Trak, members, **settings).fit(dataset(train)).score(dataset(queries))
        found = estimator(Trak, members, **given(**settings)).fit(dataset(train)).score(dataset(queries))
        assert error(found, summed(single)) < FLOAT32
        # The kernel of groups is another one.
        grouped = estimator(Trak, members, **given(**settings, kernel="group")).fit(dataset(train))
        assert error(grouped.score(dataset(queries)), summed(single)) > 1e-2


def test_of_documents_that_go_on_in_other_rows(model):
    rows = pieces()
    query = text_rows(1, seed=7)
    settings = {"unit": "document", "data_collator": default_data_collator, "projection_dim": 64}
    single = estimator(Influence, model, damping=0.3, **settings).fit(packed_rows(rows))
    labels = [k % 2 for k in range(len(single.units_["document_id"]))]
    found = estimator(Influence, model, **given(labels, **settings)).fit(packed_rows(rows)).score(query)
    assert error(found, summed(single.score(query), labels)) < FLOAT32


class Killed(Exception):
    pass


def test_goes_on_after_a_kill(monkeypatch, tmp_path, model):
    monkeypatch.setattr(store, "SHARD_UNITS", 1)
    train, queries = text_rows(7), text_rows(1, seed=7)
    labels = [0, 1, 2, 3, 3, 1, 0]

    def fitted(folder):
        settings = given(labels, projection_dim=64, store_dir=folder)
        return estimator(Trak, model, **settings).fit(dataset(train)).score(dataset(queries))

    whole = fitted(tmp_path / "whole")
    for after in (1, 2, 3, 4, 5, 6):
        folder, writes = tmp_path / f"killed-{after}", []

        def killed(write, path, content, after=after, writes=writes):
            if path.suffix == ".safetensors":
                writes.append(path)
                if len(writes) == after:
                    raise Killed
            write(path, content)

        for module in (store, unit_kernel):
            write = module.write_whole
            monkeypatch.setattr(module, "write_whole", lambda path, content, w=write: killed(w, path, content))
        with pytest.raises(Killed):
            fitted(folder)
        monkeypatch.undo()
        monkeypatch.setattr(store, "SHARD_UNITS", 1)
        assert (fitted(folder) == whole).all()
        assert files(folder) == files(tmp_path / "whole")
    # A shard that was lost is made again, and not counted twice.
    next((tmp_path / "killed-1" / "member-0").iterdir()).unlink()
    assert (fitted(tmp_path / "killed-1") == whole).all()


def test_store_of_another_kernel_is_refused(tmp_path, model):
    train = dataset(text_rows(5))
    settings = given(projection_dim=64, store_dir=tmp_path / "store")
    estimator(Trak, model, **settings).fit(train)
    with pytest.raises(ValueError, match="made otherwise.*kernel"):
        estimator(Trak, model, **{**settings, "kernel": "group"}).fit(train)


def test_store_of_another_estimator_is_refused(tmp_path, model, another):
    """What members are multiplied with differs, though groups' own features may be the same."""
    train = dataset(text_rows(5))
    for number, members in enumerate((model, [model, another])):
        settings = given(projection_dim=64, store_dir=tmp_path / f"store-{number}")
        estimator(Influence, members, **settings).fit(train)
        with pytest.raises(ValueError, match="made otherwise.*members"):
            estimator(Trak, members, **settings).fit(train)


def test_rows_are_passed_once(model):
    """Groups are scattered over rows of three documents."""
    rows = [[(3 * i + k, text) for k, text in enumerate(text_rows(3, seed=i, ragged_labels=False))] for i in range(8)]
    rows = [[(d, {key: own[:4] for key, own in text.items()}) for d, text in row] for row in rows]
    labels = np.random.default_rng(0).integers(0, 3, 24)
    passed = []
    handle = model.register_forward_pre_hook(
        lambda module, arguments, keywords: passed.append(len(keywords["input_ids"])), with_kwargs=True
    )
    settings = {"unit": "document", "data_collator": default_data_collator, "projection_dim": 64}
    estimator(Influence, model, **{**given(labels, **settings), "kernel": "group"}).fit(packed_rows(rows))
    once = sum(passed)
    passed.clear()
    estimator(Influence, model, **given(labels, **settings)).fit(packed_rows(rows))
    assert sum(passed) == once
    handle.remove()


def test_a_damaged_kernel_is_named(tmp_path, model):
    train = dataset(text_rows(5))
    settings = given(projection_dim=64, store_dir=tmp_path / "store")
    estimator(Trak, model, **settings).fit(train)
    (path,) = (tmp_path / "store").glob("kernel-*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="kernel-0-00000.safetensors is damaged .*delete it, and fit again"):
        estimator(Trak, model, **settings).fit(train)


def test_room_for_the_kernel_is_spoken_of(monkeypatch, tmp_path, model, caplog):
    settings = given(projection_dim=64, store_dir=tmp_path / "store")
    monkeypatch.setattr(store, "LARGE", 0)
    with caplog.at_level("WARNING"):
        estimator(Trak, model, **settings).fit(dataset(text_rows(5)))
    assert "GiB beside them" in caplog.text
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=8 * 64**2))
    with pytest.raises(ValueError, match="features would take.*smaller projection_dim"):
        estimator(Trak, model, **{**settings, "store_dir": tmp_path / "full"}).fit(dataset(text_rows(5)))


def test_refusals(monkeypatch, model, another):
    train = dataset(text_rows(5))
    for settings in ({"output": "tokens"}, {"members": [model, another]}):
        members = settings.pop("members", model)
        with pytest.raises(ValueError, match="weighs each member.*route='summed'"):
            estimator(Trak, members, **given(route="batched", **settings)).fit(train)
    with pytest.raises(ValueError, match="datainf.*kernel='group'.*group_scores"):
        estimator(Influence, model, **given(curvature="datainf", projection_dim=None)).fit(train)
    with pytest.raises(ValueError, match="kernel='rows': choose one of 'group', 'unit'"):
        estimator(Trak, model, kernel="rows").fit(train)
    monkeypatch.setattr(unit_kernel, "free_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"kernel='unit' makes a matrix of 512 x 512.*projection_dim"):
        estimator(Trak, model, **given(projection_dim=512)).fit(train)


def test_without_groups_both_kernels_are_one(model):
    train, queries = rows_of("gpt2")
    found = [
        estimator(Trak, model, projection_dim=64, kernel=kernel).fit(dataset(train)).score(dataset(queries))
        for kernel in ("unit", "group")
    ]
    assert (found[0] == found[1]).all()
