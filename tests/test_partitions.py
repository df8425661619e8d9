"""Groups of training data: what is in them, what they do not depend on, and what is refused."""

import copy
import random
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from models import IGNORED, build, class_rows, collate, dataset, text_rows
from oracles import Float64
from oracles_attribution import losses_of
from packed_documents import packed_rows, pieces
from test_pack_documents import make_tokenizer
from transformers import default_data_collator

from hf_datashapley import GradDot, Partition, pack_documents
from hf_datashapley.attribution.partitions.clusters import nearest, of_equal_sizes, without_empty
from hf_datashapley.attribution.partitions.partition import corpus_of
from hf_datashapley.attribution.partitions.pooled import body_of, gradients, layer_of, representations


def blobs(groups=4, each=30, width=3, seed=0):
    """Points around corners that are far apart, shuffled, and the corner of each."""
    draw = np.random.default_rng(seed)
    truth = draw.permutation(np.repeat(np.arange(groups), each))
    centres = 100 * np.eye(groups, width) - 100 * (np.arange(groups) >= width)[:, None]
    return (centres[truth] + draw.normal(size=(len(truth), width))).astype(np.float32), truth


def same_groups(left, right):
    """Whether two lists of labels differ in the groups' names only."""
    pairs = set(zip(left, right, strict=True))
    return len(pairs) == len(set(left)) == len(set(right))


def packed_units(rows):
    """Documents of `pieces`, with the texts of each, in the order in which they first appear."""
    units = {}
    for row in rows:
        for document, text in row:
            units.setdefault(document, []).append(text)
    return units


# What is given.


def test_labels():
    made = Partition.from_labels(["b", "a", "b", "c", "a", "b"])
    assert made.labels.tolist() == [1, 0, 1, 2, 0, 1] and made.labels.dtype == np.int64
    assert made.names == ("a", "b", "c") and made.num_groups == 3
    assert made.sizes().tolist() == [2, 3, 1]
    assert repr(made) == "Partition(6 in 3 groups of 1 to 3)"
    assert repr(Partition.from_labels([7] * 1234)) == "Partition(1,234 in 1 group of 1,234)"
    numbers = Partition.from_labels(torch.tensor([10, 9, 10]))
    assert numbers.labels.tolist() == [1, 0, 1] and numbers.names == ("9", "10")


@pytest.mark.parametrize(
    "labels, named",
    [
        ([], "labels have shape .0."),
        ([[1, 2], [3, 4]], "label 0 is a list.*one value for each sample"),
        (["a", None], "1 labels are missing .None, NaN., number 1 first"),
        (["a", float("nan")], "1 labels are missing"),
        (np.array(["2020-01-01", "NaT"], dtype="datetime64[D]"), "1 labels are missing"),
        (["a", pd.NA], "1 labels are missing"),
        ([1, "1"], "labels cannot be compared"),
        ([1.0, float("nan"), float("nan")], "2 labels are missing .None, NaN., number 1 first"),
        (np.array(["a", 1], dtype=object), "cannot be compared.*strings"),
    ],
)
def test_labels_refused(labels, named):
    with pytest.raises(ValueError, match=named):
        Partition.from_labels(labels)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (([0, 2, 2], 3), "1 of 3 groups are empty, 1 first: leave them out"),
        (([0, 1, 3], 3), "reach from 0 to 3, and num_groups=3.*from_labels"),
        (([-1, 1], 2), "reach from -1 to 1"),
        (([0.0, 1.0], 2), "labels are float64.*from_labels"),
        (([0, 1], 2, ("a",)), "1 names for 2 groups"),
        (([], 0), "labels have shape .0."),
    ],
)
def test_groups_that_cannot_be(arguments, named):
    with pytest.raises(ValueError, match=named):
        Partition(np.array(arguments[0]), *arguments[1:])


def test_column():
    table = datasets.Dataset.from_dict({"source": ["web", "book", "web", "code"], "year": [3, 1, 3, 2]})
    made = Partition.from_column(table, "source")
    assert made.labels.tolist() == [2, 0, 2, 1] and made.names == ("book", "code", "web")
    assert Partition.from_column(table, "year").names == ("1", "2", "3")
    order = [3, 0, 2, 1]
    assert Partition.from_column(table.select(order), "source").labels.tolist() == made.labels[order].tolist()


@pytest.mark.parametrize(
    "column, named",
    [
        ("none", "no column 'none': choose one of gaps, nans, lists"),
        ("gaps", "'gaps' is null for 1 samples"),
        ("nans", "'nans' is null for 1 samples"),
        ("lists", "'lists' holds list"),
    ],
)
def test_column_refused(column, named):
    table = datasets.Dataset.from_dict({"gaps": ["a", None], "nans": [float("nan"), 1.0], "lists": [[1], [2]]})
    with pytest.raises(ValueError, match=named):
        Partition.from_column(table, column)
    with pytest.raises(ValueError, match="a list has no columns: give a datasets.Dataset"):
        Partition.from_column([{"gaps": 1}], "gaps")
    with pytest.raises(ValueError, match="labels have shape .0."):
        Partition.from_column(table.select([]), "gaps")


@pytest.mark.parametrize("n, size", [(10, 3), (64, 64), (7, 1), (1000, 64), (5, 9)])
def test_random_groups_are_of_a_size(n, size):
    made = Partition.random(n, group_size=size, seed=3)
    assert made.num_groups == -(-n // size) and made.sizes().max() <= size
    assert np.ptp(made.sizes()) <= 1
    again = Partition.random(n, made.num_groups, seed=3)
    assert again.labels.tolist() == made.labels.tolist()
    if 1 < made.num_groups < n:
        assert not same_groups(Partition.random(n, made.num_groups, seed=4).labels, made.labels)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({}, "num_groups=None and group_size=None: give one"),
        ({"num_groups": 2, "group_size": 2}, "num_groups=2 and group_size=2: give one"),
        ({"num_groups": 6}, "num_groups=6 of 5 samples"),
        ({"num_groups": 0}, "num_groups=0 of 5"),
        ({"group_size": 0}, "group_size=0: give at least 1"),
    ],
)
def test_random_groups_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Partition.random(5, **settings)


# Clusters.


def test_clusters_are_found_in_any_order():
    points, truth = blobs()
    made = Partition.kmeans(points, 4, seed=0)
    assert same_groups(made.labels, truth)
    order = np.random.default_rng(1).permutation(len(points))
    assert same_groups(Partition.kmeans(points[order], 4).labels, truth[order])
    far = points + np.float32(1e4)  # where differences of squares would drown
    assert same_groups(Partition.kmeans(far, 4).labels, truth)


@pytest.mark.parametrize("balanced", [False, True])
def test_blocks_are_as_one_array(balanced):
    points = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    state = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    expected = Partition.kmeans(points, 7, balanced=balanced, seed=5).labels.tolist()
    cuts = [0, 1, 90, 90, 290, 300]
    parts = list(zip(cuts, cuts[1:], strict=False))
    for features in (
        (points[begin:end] for begin, end in parts),
        ((begin, torch.from_numpy(points[begin:end])) for begin, end in parts),
        torch.from_numpy(points),
        np.asfortranarray(points),
        points.astype(np.float64),
    ):
        assert Partition.kmeans(features, 7, balanced=balanced, seed=5).labels.tolist() == expected
    assert state == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_clusters_are_near_their_centres(monkeypatch):
    """Each point is nearer to the mean of its group than a random grouping's points are; and block sizes do not
    matter."""
    points = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)

    def spread(partition):
        means = np.stack([points[partition.labels == g].mean(0) for g in range(partition.num_groups)])
        return ((points - means[partition.labels]) ** 2).sum()

    free, equal = (Partition.kmeans(points, 10, balanced=balanced) for balanced in (False, True))
    assert spread(free) < spread(equal) < 0.8 * spread(Partition.random(400, 10))
    monkeypatch.setattr("hf_datashapley.attribution.partitions.clusters.DISTANCES", 50)
    assert Partition.kmeans(points, 10).labels.tolist() == free.labels.tolist()
    assert Partition.kmeans(points, 10, balanced=True).labels.tolist() == equal.labels.tolist()


@pytest.mark.parametrize("n, groups", [(10, 3), (50, 7), (8, 8), (9, 1), (100, 33), (101, 50)])
def test_equal_sizes(n, groups):
    draw = np.random.default_rng(n)
    points, centres = draw.normal(size=(n, 3)).astype(np.float32), draw.normal(size=(groups, 3))
    found = of_equal_sizes(points, centres)
    assert found.tolist() == equal_sizes_oracle(points.astype(np.float64), centres)
    sizes = np.bincount(found, minlength=groups)
    assert set(sizes) <= {n // groups, -(-n // groups)}
    made = Partition.kmeans(points, groups, balanced=True)
    assert set(made.sizes()) <= {n // groups, -(-n // groups)}


def equal_sizes_oracle(points, centres):
    """Point by point: whoever has no place asks the nearest centre with room, which takes the nearest first."""
    n, groups = len(points), len(centres)
    distance = [[((point - centre) ** 2).sum() for centre in centres] for point in points]
    wish = [min(range(groups), key=lambda k: distance[i][k]) for i in range(n)]
    popular = sorted(range(groups), key=lambda k: (-wish.count(k), k))
    room = [n // groups + (popular.index(k) < n % groups) for k in range(groups)]
    labels = [None] * n
    while None in labels:
        asked = {k: [] for k in range(groups)}
        for i in range(n):
            if labels[i] is None:
                asked[min((k for k in range(groups) if room[k]), key=lambda k: distance[i][k])].append(i)
        for k, own in asked.items():
            for i in sorted(own, key=lambda i: distance[i][k])[: room[k]]:
                labels[i] = k
            room[k] -= min(room[k], len(own))
    return labels


def test_no_cluster_is_empty():
    points, centres = np.array([[0.0], [1.0], [2.0], [30.0]], np.float32), np.array([[1.0], [500.0], [900.0]])
    found = without_empty(points, *nearest(points, centres, np.arange(4)), 3)
    # The farthest two of the first centre's leave it.
    assert found[3] != found[0] and np.bincount(found).tolist() == [2, 1, 1] and found[1] == 0
    repeated = np.repeat(np.eye(5, dtype=np.float32), 4, axis=0)
    assert same_groups(Partition.kmeans(repeated, 5).labels, np.repeat(np.arange(5), 4))
    with pytest.raises(ValueError, match="num_groups=6, and there are fewer different points.*balanced=True"):
        Partition.kmeans(repeated, 6)
    assert np.ptp(Partition.kmeans(repeated, 6, balanced=True).sizes()) <= 1
    assert sorted(Partition.kmeans(np.random.default_rng(0).normal(size=(9, 2)), 9).labels) == list(range(9))
    assert Partition.kmeans(points, 1).labels.tolist() == [0] * 4


@pytest.mark.parametrize(
    "features, groups, named",
    [
        (np.eye(3), 4, "num_groups=4 of 3 points"),
        (np.eye(3), 0, "num_groups=0 of 3 points"),
        (np.array([[0.0], [np.nan], [np.inf]]), 2, "features of point 1 are not finite"),
        ([np.eye(2), np.array([[0.0, np.inf]])], 2, "features of point 2 are not finite"),
        ([np.eye(2), np.eye(3)], 2, "from point 2 on are 3 for each, and 2 before them"),
        ([(0, np.eye(2)), (3, np.eye(2))], 2, "begins at 3 after 2 points"),
        ([[0.0, 1.0], [1.0, 2.0]], 2, "shape .2. .*array .points, features. .*or an iterator over blocks"),
        (np.array([["a", "b"]]), 1, "type <U1"),
        (np.zeros(4), 2, "features have shape .4."),
        (np.zeros((0, 4)), 2, "features have shape .0, 4."),
        (iter([]), 2, "features have no points"),
    ],
)
def test_clusters_refused(features, groups, named):
    with pytest.raises(ValueError, match=named):
        Partition.kmeans(features, groups)


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r'pip install "hf_datashapley\[grouping\]"'):
        Partition.kmeans(np.eye(3), 2)


# What is clustered.


def features_of(function, model, part, rows, *, unit="sample", collator=collate):
    corpus = corpus_of(model, rows, unit, 3, collator, "document_id", False)
    return torch.cat(list(function(model, part, corpus))).double().numpy()


def units_of(kind):
    """Rows, how they are read, and the texts of each unit."""
    if kind == "sample":
        rows = text_rows(7)
        return dataset(rows), {}, [[row] for row in rows]
    rows = pieces()
    return packed_rows(rows), {"unit": "document", "collator": default_data_collator}, [*packed_units(rows).values()]


@pytest.mark.parametrize("kind", ["sample", "document"])
@pytest.mark.parametrize("name", ["gpt2", "llama-lora"])
def test_representations_are_means_of_hidden_states(name, kind):
    model = build(name, dropout=0.0).train()
    rows, reading, units = units_of(kind)
    found = features_of(representations, model, body_of(model), rows, **reading)
    model.eval()
    for vector, texts in zip(found, units, strict=True):
        hidden = []
        for text in texts:
            # Of a piece without a label nothing is told apart from padding.
            if kind == "document" and all(label == IGNORED for label in text["labels"][1:]):
                continue
            with torch.no_grad():
                states = model(input_ids=torch.tensor([text["input_ids"]]), output_hidden_states=True).hidden_states
            hidden.append(states[-1][0])
        expected = torch.cat(hidden).mean(0) if hidden else np.zeros(16)
        np.testing.assert_allclose(vector, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["sample", "document"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama-lora"])
def test_gradients_are_those_of_what_enters_the_output_layer(name, kind):
    """As a bias that is added to it has them."""
    model = build(name).train()
    rows, reading, units = units_of(kind)
    found = features_of(gradients, model, layer_of(model, None), rows, **reading)
    truth = copy.deepcopy(model).double().eval()
    base = truth.get_base_model() if name == "llama-lora" else truth
    check_gradients(found, truth, base.get_output_embeddings(), units)


def check_gradients(found, truth, layer, units):
    bias = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] + bias,))
    scale = np.abs(found).max()
    assert scale > 1e-3
    for vector, texts in zip(found, units, strict=True):
        with Float64():
            losses = torch.cat([losses_of(truth, text) for text in texts])
        expected = np.zeros(16)
        if len(losses):
            expected = torch.autograd.grad(losses.sum(), bias)[0].numpy() / len(losses)
        np.testing.assert_allclose(vector, expected, atol=1e-5 * scale)


def test_gradients_of_a_classifier():
    model, rows = build("gpt2-classifier"), class_rows(5)
    found = features_of(gradients, model, layer_of(model, "score"), dataset(rows))
    truth = copy.deepcopy(model).double().eval()
    check_gradients(found, truth, truth.score, [[row] for row in rows])
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification does not say.*output_layer='score'"):
        Partition.of_gradients(model, dataset(rows), 2)
    with pytest.raises(ValueError, match="output_layer='head' is no module"):
        Partition.of_gradients(model, dataset(rows), 2, output_layer="head")
    with pytest.raises(ValueError, match="passed 0 times"):
        features_of(gradients, model, layer_of(model, "transformer.h"), dataset(rows))


@pytest.mark.parametrize("make", [Partition.of_representations, Partition.of_gradients])
def test_clusters_of_what_a_model_makes(make):
    model, rows = build("gpt2-lora").train(), text_rows(9)
    flags = [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()]
    trained = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    settings = {"data_collator": collate, "progress": False}
    made = make(model, dataset(rows), 3, balanced=True, **settings)
    assert made.sizes().tolist() == [3, 3, 3]
    assert [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == trained and torch.equal(torch.get_rng_state(), state)
    again = make(model, dataset(rows), 3, balanced=True, batch_size=1, **settings)
    assert again.labels.tolist() == made.labels.tolist() and again.fingerprint == made.fingerprint
    by_document = make(model, packed_rows(pieces()), 4, unit="document", progress=False)
    assert len(by_document.labels) == 13
    with pytest.raises(ValueError, match="Linear (is no model of transformers|does not say which module)"):
        make(torch.nn.Linear(2, 2), dataset(rows), 3, **settings)
    with pytest.raises(ValueError, match="unit='token': groups are of samples or of documents"):
        make(model, dataset(rows), 3, unit="token", **settings)


def test_clusters_of_texts():
    table = datasets.Dataset.from_dict({"text": ["a a a", "b", "a a", "b b b"], "number": [1, 2, 3, 4]})

    def encode(texts):
        torch.rand(1)
        return [[text.count("a"), text.count("b") + 50 * ("b" in text)] for text in texts]

    state = torch.get_rng_state()
    made = Partition.of_representations(encode, table, 2, progress=False)
    assert same_groups(made.labels, [0, 1, 0, 1]) and torch.equal(torch.get_rng_state(), state)
    for column, named in (("number", "'number' holds int64, not text"), ("none", "no column 'none'")):
        with pytest.raises(ValueError, match=named):
            Partition.of_representations(encode, table, 2, text_column=column, progress=False)
    with pytest.raises(ValueError, match="1 vectors of 4 texts"):
        Partition.of_representations(lambda texts: [[1.0]], table, 2, progress=False)
    with pytest.raises(ValueError, match="unit='document', and an encoder reads texts.*of_documents"):
        Partition.of_representations(encode, table, 2, unit="document")


def test_clusters_of_parameters_gradients():
    model, rows = build("gpt2"), text_rows(6, ragged_labels=False)
    twice = dataset([*rows, *rows])
    fitted = GradDot(model, projection_dim=64, data_collator=collate, progress=False).fit(twice)
    made = Partition.kmeans(fitted.features(), 3)
    assert made.labels[:6].tolist() == made.labels[6:].tolist()
    whole = np.concatenate([block.numpy() for _, block in fitted.features()])
    assert Partition.kmeans(whole, 3).labels.tolist() == made.labels.tolist()


# Documents.


@pytest.mark.parametrize("projection_dim", [None, 256])
def test_groups_of_packed_documents_are_sums_of_their_documents(projection_dim):
    model, rows = build("gpt2"), packed_rows(pieces())
    # Document 13, the only one from "z", had no token.
    sources = list("bacabaaccbacbz")
    documents = datasets.Dataset.from_dict({"source": sources})
    groups = Partition.of_documents(rows, Partition.from_column(documents, "source"), progress=False)
    assert groups.names == ("a", "b", "c")
    settings = {"unit": "document", "projection_dim": projection_dim, "progress": False}
    single = GradDot(model, **settings).fit(rows)
    queries = [{key: row[key][:5] for key in row} for row in text_rows(2, seed=9, ragged_labels=False)]
    scores = single.score(queries)
    found = GradDot(model, partition=groups, **settings).fit(rows)
    of_unit = np.array([sources[document] for document in single.units_["document_id"]])
    expected = np.stack([scores[of_unit == name].sum(0) for name in "abc"])
    assert found.units_["group"].tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(found.score(queries), expected, atol=2e-5 * np.abs(expected).max())
    each = Partition.of_documents(rows, progress=False)
    assert each.names == tuple(map(str, single.units_["document_id"])) and each.num_groups == 13
    singletons = GradDot(model, partition=each, **settings).fit(rows).score(queries)
    np.testing.assert_allclose(singletons, scores, atol=2e-6 * np.abs(scores).max())


def test_documents_known_by_ids():
    ids = [40, 7, 300, 7, 12]
    texts = [[row["input_ids"], []][i == 2] for i, row in enumerate(text_rows(5))]
    documents = datasets.Dataset.from_dict({"input_ids": texts, "document_id": ids, "source": list("xyzyx")})
    packed = pack_documents(documents, make_tokenizer(), 16)
    groups = Partition.from_column(documents, "source")
    made = Partition.of_documents(packed, groups, ids=documents["document_id"][:], progress=False)
    # In the order in which they lie in the rows.
    assert made.labels.tolist() == [0, 1, 0] and made.names == ("x", "y")
    with pytest.raises(ValueError, match="2 of 3 packed documents have no group, id 40, 12 first.*their ids"):
        Partition.of_documents(packed, Partition.random(8, 2), progress=False)
    with pytest.raises(ValueError, match="1 document ids have more than one group, 7 first"):
        Partition.of_documents(packed, Partition.from_labels(list("xyzwx")), ids=ids, progress=False)
    with pytest.raises(ValueError, match="ids have shape .4. .*groups of 5 documents"):
        Partition.of_documents(packed, groups, ids=ids[:4], progress=False)
    with pytest.raises(ValueError, match="no column 'document_id'"):
        Partition.of_documents(text_rows(2), groups, progress=False)


def test_one_group_is_all_and_groups_of_one_are_their_samples():
    model, train = build("gpt2"), dataset(text_rows(6))
    queries = dataset(text_rows(2, seed=7, ragged_labels=False))
    settings = {"data_collator": collate, "progress": False}
    single = GradDot(model, **settings).fit(train).score(queries)
    for groups, expected in (
        (Partition.random(6, 1), single.sum(0, keepdims=True)),
        (Partition.random(6, group_size=1), single),
    ):
        found = GradDot(model, partition=groups, **settings).fit(train).score(queries)
        np.testing.assert_allclose(found[groups.labels][: len(expected)], expected, atol=1e-5 * np.abs(single).max())


def test_the_order_of_samples_does_not_matter():
    model, train = build("gpt2"), text_rows(6)
    queries, order = dataset(text_rows(2, seed=7, ragged_labels=False)), [3, 0, 5, 1, 4, 2]
    made = Partition.from_labels([0, 1, 2, 1, 0, 1])
    moved = Partition(made.labels[order], 3)
    scores = [
        GradDot(model, partition=groups, data_collator=collate, progress=False).fit(rows).score(queries)
        for groups, rows in ((made, dataset(train)), (moved, dataset([train[i] for i in order])))
    ]
    np.testing.assert_allclose(*scores, atol=1e-5 * np.abs(scores[0]).max())


# On disk.


def test_saved_and_loaded(tmp_path):
    table = datasets.Dataset.from_dict({"source": ["web", "book", "web", "Ümlaut"]})
    made = Partition.from_column(table, "source")
    made.save(tmp_path / "groups")
    found = Partition.load(tmp_path / "groups", table)
    assert found.labels.tolist() == made.labels.tolist() and found.labels.dtype == np.int64
    assert (found.num_groups, found.names, found.fingerprint) == (3, made.names, made.fingerprint)
    other = datasets.Dataset.from_dict({"source": ["web", "book", "book", "Ümlaut"]})
    for wrong in (other, table.select([0, 1, 2]), table.select([1, 0, 2, 3]), [{"source": 1}]):
        with pytest.raises(ValueError, match="groups is a partition of another dataset"):
            Partition.load(tmp_path / "groups", wrong)
    assert Partition.load(tmp_path / "groups").names == made.names
    free = Partition.random(4, 2)
    free.save(tmp_path / "groups")  # in place of what was there
    assert Partition.load(tmp_path / "groups").names is None
    with pytest.raises(ValueError, match="does not say of which dataset.*bound_to"):
        Partition.load(tmp_path / "groups", table)
    free.bound_to(table).save(tmp_path / "groups")
    assert Partition.load(tmp_path / "groups", table).labels.tolist() == free.labels.tolist()


def test_other_files_are_no_partitions(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError):
        Partition.load(tmp_path / "none")
    (tmp_path / "text").write_text("no partition")
    with pytest.raises(ValueError, match="damaged, or no partition"):
        Partition.load(tmp_path / "text")
    Partition.random(4, 2).save(tmp_path / "later")
    later = (tmp_path / "later").read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 2')
    (tmp_path / "later").write_bytes(later)
    with pytest.raises(ValueError, match="has format 2, and this version reads 1"):
        Partition.load(tmp_path / "later")
    save_file({"labels": torch.zeros(3)}, tmp_path / "tensors")
    with pytest.raises(ValueError, match="no partition: give a file that Partition.save has written"):
        Partition.load(tmp_path / "tensors")


def test_models_that_train_are_parted_by(tmp_path):
    """With dropout, as they are after `Trainer.train`; nothing is drawn from torch's global state."""
    model = build("gpt2", dropout=0.1).train()
    rows = dataset(text_rows(6))
    state = torch.get_rng_state()
    for make in (Partition.of_gradients, Partition.of_representations):
        found = make(model, rows, 2, data_collator=collate, progress=False)
        assert len(found.labels) == 6 and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_fingerprints_are_of_what_rows_hold(tmp_path):
    """Slices and other batches lie otherwise in memory."""
    texts = [f"document {number}" * (number % 3 + 1) for number in range(50)]
    whole = datasets.Dataset.from_dict({"text": texts, "source": [number % 3 for number in range(50)]})
    part = whole.select(range(5, 15))
    Partition.from_column(part, "source").save(tmp_path / "partition")
    Partition.load(tmp_path / "partition", datasets.Dataset.from_dict(part[:]))
    Partition.load(tmp_path / "partition", part.map(lambda rows: rows, batched=True, batch_size=3))
    with pytest.raises(ValueError, match="another dataset"):
        Partition.load(tmp_path / "partition", whole.select(range(6, 16)))


def test_names_are_different():
    with pytest.raises(ValueError, match="two groups have one name"):
        Partition(np.array([0, 1]), 2, ("a", "a"))


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (Partition.random, {"n": 10, "num_groups": 2.0}),
        (Partition.random, {"n": 10.0, "num_groups": 2}),
        (Partition.random, {"n": 10, "group_size": 2.5}),
        (Partition.random, {"n": 10, "num_groups": 2, "seed": -1}),
        (Partition.kmeans, {"features": np.eye(4), "num_groups": 2.0}),
        (Partition.kmeans, {"features": np.eye(4), "num_groups": 2, "seed": -1}),
    ],
)
def test_numbers_are_whole(make, given):
    with pytest.raises(ValueError, match="give an integer of 0 or more"):
        make(**given)
