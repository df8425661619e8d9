"""Scores after training, held against float64 autograd; what they do not depend on; and what is refused."""

import copy
import gc

import datasets
import numpy as np
import pytest
import torch
from models import IGNORED, PAD, build, class_rows, collate, dataset, rows_for, text_rows
from oracles_attribution import Oracle, flat, losses_of
from packed_documents import packed_rows, pieces
from transformers import DataCollatorWithFlattening, default_data_collator

from hf_datashapley import GradCos, GradDot, Influence, Partition, Trak


FLOAT32 = 1e-5


def estimator(kind, members, **settings):
    return kind(members, **{"data_collator": collate, "progress": False, "batch_size": 4, **settings})


def scores(kind, members, train, queries, **settings):
    return estimator(kind, members, **settings).fit(train).score(queries)


def error(found, expected):
    expected = np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == np.float32
    return np.abs(found - expected).max() / np.abs(expected).max()


def rows_of(name):
    """Row 2 of texts has no label."""
    return rows_for(name, 5), rows_for(name, 3, seed=7)[:2]


MODELS = ("gpt2", "neox", "llama", "gpt2-lora", "llama-lora", "gpt2-classifier")


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_samples_are_autograds(name):
    model = build(name)
    train, queries = rows_of(name)
    oracle = Oracle(model, [[row] for row in train], queries)
    given = (model, dataset(train), dataset(queries))
    assert error(scores(GradDot, *given), oracle.dot()) < FLOAT32
    assert error(scores(GradCos, *given), oracle.cos()) < FLOAT32
    assert error(scores(Influence, *given, projection_dim=None, damping=0.3), oracle.influence(0.3)) < FLOAT32
    for output in ("mean", "tokens"):
        kernel, q_N = oracle.trak(0.3, output)
        found = scores(Trak, *given, projection_dim=None, damping=0.3, output=output)
        assert error(found, kernel * q_N[:, None]) < FLOAT32, output


@pytest.mark.parametrize("kind", [GradDot, GradCos, Influence, Trak])
def test_of_documents_and_their_groups(kind):
    """Document 3 goes on in the second row."""
    model, rows = build("gpt2"), pieces()
    units = {}
    for row in rows:
        for document, text in row:
            units.setdefault(document, []).append(text)
    queries = text_rows(2, seed=7)
    settings = {"unit": "document", "data_collator": default_data_collator}
    groups = Partition.from_labels([k % 3 for k in range(len(units))])
    grouped = [[text for k in range(g, len(units), 3) for text in list(units.values())[k]] for g in range(3)]
    for made, partition in ((list(units.values()), None), (grouped, groups)):
        oracle = Oracle(model, made, queries)
        if kind in (GradDot, GradCos):
            expected = oracle.dot() if kind is GradDot else oracle.cos()
        else:
            settings["projection_dim"] = None
            kernel, q_N = oracle.trak(1.0, "mean")
            expected = oracle.influence(1.0) if kind is Influence else kernel * q_N[:, None]
        fitted = estimator(kind, model, partition=partition, **settings).fit(packed_rows(rows))
        # Query rows need one length under the default collator: one by one.
        found = np.concatenate([fitted.score([query]) for query in queries], axis=1)
        assert error(found, expected) < FLOAT32
        if partition is None:
            assert fitted.units_["document_id"].tolist() == list(units)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_of_tokens(name):
    model, (train, queries) = build(name), rows_of(name)
    oracle = Oracle(model, [[row] for row in train], queries)
    fitted = estimator(GradDot, model, unit="token").fit(dataset(train, ids=[10, 11, 12, 13, 14]))
    found = fitted.score(dataset(queries))
    assert error(found, oracle.dot(oracle.token_gradients())) < FLOAT32
    labelled = [(10 + i, t) for i, row in enumerate(train) for t, y in enumerate(row["labels"]) if t and y != IGNORED]
    assert list(zip(fitted.units_["sample_id"], fitted.units_["position"], strict=True)) == labelled
    # They add up to their samples'.
    sums = np.stack([found[fitted.units_["sample_id"] == 10 + i].sum(0) for i in range(5)])
    assert error(sums, oracle.dot()) < FLOAT32


def test_groups_add_up():
    model, (train, queries) = build("gpt2"), rows_of("gpt2")
    labels = ["b", "a", "b", "c", "a"]
    fitted = estimator(GradDot, model, partition=Partition.from_labels(labels)).fit(dataset(train))
    single = scores(GradDot, model, dataset(train), dataset(queries))
    assert fitted.units_["group"].tolist() == ["a", "b", "c"]
    expected = np.stack([single[[label == name for label in labels]].sum(0) for name in "abc"])
    assert error(fitted.score(dataset(queries)), expected) < FLOAT32


def left(rows):
    """`collate`, but the padding comes first."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key, value):
        return torch.tensor([[value] * (longest - len(row["input_ids"])) + list(row[key]) for row in rows])

    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {"input_ids": filled("input_ids", PAD), "attention_mask": filled("attention_mask", 0)} | {
        "labels": filled("labels", IGNORED)
    }


@pytest.mark.parametrize("unit", ["sample", "token"])
@pytest.mark.parametrize("projection_dim", [None, 512])
def test_batches_and_padding_change_nothing(unit, projection_dim):
    model, (train, queries) = build("llama"), rows_of("llama")
    expected = None
    for settings in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 5, "data_collator": left}):
        kind = estimator(GradDot, model, unit=unit, projection_dim=projection_dim, **settings)
        fitted = kind.fit(dataset(train))
        found = fitted.score(dataset(queries))
        expected = found if expected is None else expected
        assert error(found, expected) < FLOAT32
        assert (
            fitted.units_["sample_id"].tolist()
            == estimator(GradDot, model, unit=unit).fit(dataset(train)).units_["sample_id"].tolist()
        )


def test_flattened_rows():
    model, train, queries = build("gpt2"), text_rows(5, ragged_labels=False), text_rows(2, seed=7)
    oracle = Oracle(model, [[row] for row in train], queries)
    given = (model, dataset(train), dataset(queries))
    assert error(scores(GradDot, *given, data_collator=DataCollatorWithFlattening()), oracle.dot()) < FLOAT32


def test_ensembles_are_means():
    models = [build("gpt2", seed=seed) for seed in (0, 1)]
    train, queries = rows_of("gpt2")
    oracles = [Oracle(model, [[row] for row in train], queries) for model in models]
    given = (models, dataset(train), dataset(queries))
    assert error(scores(GradDot, *given), sum(oracle.dot() for oracle in oracles) / 2) < FLOAT32
    assert error(scores(GradCos, *given), sum(oracle.cos() for oracle in oracles) / 2) < FLOAT32
    made = [oracle.trak(1.0, "mean") for oracle in oracles]
    expected = (made[0][0] + made[1][0]) / 2 * ((made[0][1] + made[1][1]) / 2)[:, None]
    assert error(scores(Trak, *given, projection_dim=None), expected) < FLOAT32


def test_top():
    model = build("gpt2")
    train = text_rows(4, ragged_labels=False)
    rows = [*train, train[1]]  # a tie
    table = dataset(rows).add_column("text", [f"text {k}" for k in range(5)])
    queries = dataset([train[1], train[3]])
    fitted = estimator(GradDot, model, batch_size=1).fit(table)
    found = fitted.score(queries)
    for lowest in (False, True):
        top = fitted.top(queries, 3, lowest=lowest)
        assert top["query"][:] == [0, 0, 0, 1, 1, 1] and top["rank"][:] == [0, 1, 2] * 2
        for query in (0, 1):
            order = sorted(range(5), key=lambda k: (found[k, query] if lowest else -found[k, query], k))[:3]
            own = top.select(range(3 * query, 3 * query + 3))
            assert own["sample_id"][:] == order
            assert own["text"][:] == [f"text {k}" for k in order]
            assert own["score"][:] == [float(found[k, query]) for k in order]
    assert fitted.top(queries, 9).num_rows == 10
    with pytest.raises(ValueError, match="k=0"):
        fitted.top(queries, 0)


class Numbers:
    def decode(self, ids):
        return " ".join(map(str, ids))


def test_top_shows_documents_and_tokens():
    model, rows = build("gpt2"), pieces()
    settings = {"unit": "document", "data_collator": default_data_collator}
    fitted = estimator(GradDot, model, **settings).fit(packed_rows(rows))
    top = fitted.top([text_rows(1)[0]], 12, tokenizer=Numbers())
    for document, text in zip(top["document_id"], top["text"], strict=True):
        ids = [i for row in rows for own, piece in row if own == document for i in piece["input_ids"]]
        assert text == " ".join(map(str, ids))
    train = text_rows(2, ragged_labels=False)
    top = estimator(GradDot, model, unit="token").fit(dataset(train)).top(dataset(train), 3, tokenizer=Numbers())
    for sample, position, text in zip(top["sample_id"], top["position"], top["text"], strict=True):
        assert text == str(train[sample]["input_ids"][position])


def test_texts_of_tokens_in_rows_that_are_padded_on_the_left():
    """Their positions do not count padding, which the rows' own ids have."""

    class Numbers:
        def decode(self, ids):
            return " ".join(str(int(token)) for token in ids)

    model, plain = build("llama"), text_rows(3, ragged_labels=False)
    whole = left(plain)
    padded = [{name: values[i].tolist() for name, values in whole.items()} for i in range(3)]
    queries = dataset(text_rows(1, seed=7))
    found, expected = (
        estimator(GradDot, model, unit="token", data_collator=collator).fit(rows).top(queries, 40, tokenizer=Numbers())
        for rows, collator in ((padded, default_data_collator), (plain, collate))
    )
    for column in ("sample_id", "position", "text"):
        assert list(found[column]) == list(expected[column])


def test_settings_read_back():
    model = build("gpt2")
    made = Trak(model, projection_dim=64, damping=0.5)
    assert repr(made) == "Trak(GPT2LMHeadModel, projection_dim=64, damping=0.5)"
    parameters = made.get_params()
    assert parameters["members"] is model and parameters["damping"] == 0.5
    assert Trak(**parameters).get_params() == parameters
    assert made.set_params(damping=0.2) is made and made.damping == 0.2
    with pytest.raises(ValueError, match="no setting 'dampening'"):
        made.set_params(dampening=1)


@pytest.mark.parametrize("projection_dim", [None, 128])
def test_what_was_fitted_keeps_its_settings(projection_dim):
    """Else queries would be projected otherwise than units were."""
    model = build("gpt2")
    train, queries = dataset(text_rows(6)), dataset(text_rows(2, seed=7))
    made = estimator(Trak, model, projection_dim=projection_dim).fit(train)
    expected = made.score(queries)
    made.set_params(seed=1, output="tokens", modules=["c_fc"], damping=5.0)
    assert (made.score(queries) == expected).all()
    again = made.fit(train).score(queries)
    assert error(again, Trak(**made.get_params()).fit(train).score(queries)) == 0
    assert error(again, expected) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "documents"}, "unit='documents'.*'document'"),
        ({"store_dtype": "bfloat16"}, "store_dtype='bfloat16'.*'float16'"),
        ({"projection": "jl"}, "projection='jl'.*'sjlt'"),
        ({"output": "sum"}, "output='sum'.*'tokens'"),
        ({"seed": None}, "seed=None"),
        ({"seed": -1}, "seed=-1"),
        ({"members": "gpt2"}, "members is a str.*CheckpointEnsemble"),
        ({"members": iter([])}, "members is a list_iterator"),
    ],
)
def test_what_no_setting_can_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        estimator(Trak, **{"members": build("gpt2"), **settings}).fit(text_rows(2))


def test_empty_queries_are_called_so():
    with pytest.raises(ValueError, match="query_dataset is empty"):
        estimator(GradDot, build("gpt2")).fit(text_rows(2)).score([])


@pytest.mark.parametrize("projection", ["logra", "sjlt"])
def test_members_average_the_noise_of_projection(projection):
    """Each member has a draw of its own: of equal members, nothing else differs."""
    model = build("gpt2", width=32)
    rows = (dataset(text_rows(12, ragged_labels=False)), dataset(text_rows(4, seed=7, ragged_labels=False)))
    exact = scores(GradDot, model, *rows)
    settings = {"projection_dim": 256, "projection": projection}
    alone, together = (scores(GradDot, [model] * count, *rows, **settings) for count in (1, 8))
    assert np.linalg.norm(together - exact) < 0.6 * np.linalg.norm(alone - exact)


def test_of_half_precision():
    """No further from the truth than autograd's gradients of the same model in half precision."""
    model = build("llama", dtype=torch.bfloat16)
    train, queries = rows_of("llama")
    oracle = Oracle(model, [[row] for row in train], queries)
    model.eval()
    halves = [flat(losses_of(model, row).float().sum(), model).double() for row in train]
    means = [flat(losses_of(model, row).float().mean(), model).double() for row in queries]
    plain = (torch.stack(halves) @ torch.stack(means).T).float().numpy()
    found = scores(GradDot, model, dataset(train), dataset(queries))
    assert error(found, oracle.dot()) < max(2e-2, 1.5 * error(plain, oracle.dot()))


def state_of(model):
    flags = [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()]
    parameters = [(name, p.requires_grad, p.grad is None, p.detach().clone()) for name, p in model.named_parameters()]
    return flags, parameters, dict(vars(model.config))


def assert_same_state(before, after):
    assert before[0] == after[0] and before[2] == after[2]
    for old, new in zip(before[1], after[1], strict=True):
        assert old[:3] == new[:3] and torch.equal(old[3], new[3])


@pytest.mark.parametrize("name", ["gpt2", "llama-lora"])
@pytest.mark.parametrize("projection_dim", [None, 256])
def test_the_model_is_left_as_it_was(name, projection_dim):
    model = build(name).train()
    model.config.use_cache = True
    train, queries = rows_of("gpt2")
    before = copy.deepcopy(state_of(model))
    random = torch.get_rng_state()
    fitted = estimator(GradDot, model, projection_dim=projection_dim).fit(dataset(train))
    fitted.score(dataset(queries))
    assert_same_state(before, state_of(model))
    with pytest.raises(ValueError, match="rows \\[1\\] have no labelled token"):
        fitted.score([queries[0], {**queries[1], "labels": [IGNORED] * len(queries[1]["labels"])}])
    with pytest.raises(RuntimeError, match="the third"):
        estimator(GradDot, model, projection_dim=64, data_collator=Failing()).fit(dataset(train))
    assert_same_state(before, state_of(model))
    assert torch.equal(torch.get_rng_state(), random)


class Failing:
    """Breaks at its third batch."""

    def __init__(self):
        self.left = 2

    def __call__(self, rows):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the third batch")
        return collate(rows)


class Auxiliary(torch.nn.Module):
    """A loss that is more than the mean over tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels=None):
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if labels is not None:
            found.loss = found.loss + 0.1
        return found


def no_labels(rows):
    return {key: value for key, value in collate(rows).items() if key != "labels"}


def test_refusals():
    model, rows = build("gpt2"), dataset(text_rows(4))
    for settings, message in [
        ({"projection_dim": 0}, "projection_dim=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"data_collator": no_labels}, "train_dataset has no labels"),
        ({"partition": Partition.from_labels([0, 1])}, "partition has 2 labels and train_dataset 4 samples"),
        ({"unit": "token", "data_collator": DataCollatorWithFlattening()}, "unit='token' needs a row for each"),
        ({"unit": "token", "partition": Partition.from_labels([0, 1, 2, 2])}, "unit='token' and a partition"),
        ({"modules": ["nothing"]}, "modules: 'nothing' matches no module"),
    ]:
        with pytest.raises(ValueError, match=message):
            estimator(GradDot, model, **settings).fit(rows)
    for kind in (Influence, Trak):
        with pytest.raises(ValueError, match="damping=0"):
            estimator(kind, model, projection_dim=64, damping=0).fit(rows)
    with pytest.raises(ValueError, match="was not fitted"):
        GradDot(model).score(rows)
    with pytest.raises(ValueError, match="train_dataset is a stream"):
        estimator(GradDot, model).fit(rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="the model's own loss"):
        estimator(GradDot, Auxiliary(model)).fit(rows)
    with pytest.raises(ValueError, match="labels are torch.float32"):
        estimator(GradDot, build("gpt2-regressor")).fit(dataset(class_rows(3, regression=True)))
    with pytest.raises(ValueError, match="rows \\[2\\] have no labelled token"):
        estimator(GradDot, model).fit(rows).score(rows)
    with pytest.raises(ValueError, match="train_dataset"):
        estimator(GradDot, model).fit(datasets.Dataset.from_dict({"input_ids": [], "labels": []}))


def test_padding_that_changes_losses_is_refused():
    """GPT-2 counts padding as positions, Llama does not."""
    train = dataset(text_rows(4))
    with pytest.raises(ValueError, match="pads on the left.*padding_side='right'"):
        estimator(GradDot, build("gpt2"), data_collator=left).fit(train)
    estimator(GradDot, build("llama"), data_collator=left).fit(train)


@pytest.mark.parametrize("settings", [{"curvature": "identity"}, {"curvature": "identity", "projection_dim": 64}])
def test_nothing_labelled_has_no_influence(settings):
    train = dataset([{**row, "labels": [IGNORED] * len(row["labels"])} for row in text_rows(3)])
    fitted = estimator(Influence, build("gpt2"), **{"projection_dim": None, **settings})
    with pytest.raises(ValueError, match="no row has a labelled token"):
        fitted.fit(train).score(dataset(text_rows(1)))


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), None, True])
def test_damping_is_looked_at_first(damping):
    with pytest.raises(ValueError, match="damping=.*above 0"):
        Trak(None, damping=damping).check()


def test_features_outlive_their_estimator():
    """Their folder is a temporary one."""
    found = estimator(GradDot, build("gpt2"), projection_dim=64).fit(dataset(text_rows(3))).features()
    gc.collect()
    assert sum(len(block) for _, block in found) == 3


def test_a_collator_that_draws_is_refused():
    """Each pass over the rows would be of others."""

    def masked(rows):
        batch = collate(rows)
        return {**batch, "labels": batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.5, IGNORED)}

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="data_collator draws at random"):
        GradDot(build("gpt2"), data_collator=masked, progress=False).fit(text_rows(4))
    assert torch.equal(state, torch.get_rng_state())


def test_gradients_are_taken_where_they_are_switched_off():
    model, rows = build("gpt2"), text_rows(4, ragged_labels=False)
    for dim in (None, 64):
        estimator = GradDot(model, projection_dim=dim, data_collator=collate, progress=False)
        expected = estimator.fit(rows).score(rows)
        with torch.no_grad():
            np.testing.assert_array_equal(estimator.fit(rows).score(rows), expected)
            assert len(estimator.top(rows, 1)) == 4


def test_a_collator_that_labels_what_rows_leave_out_is_refused():
    """The prompt of a query would be asked about again."""

    def relabelled(rows):
        batch = collate(rows)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"].eq(0), IGNORED)}

    whole, masked = text_rows(3, ragged_labels=False), text_rows(3)
    fitted = GradDot(build("gpt2"), data_collator=relabelled, progress=False).fit(whole)
    assert fitted.score(whole).shape == (3, 3)
    with pytest.raises(ValueError, match="data_collator labels tokens that the rows of query_dataset leave out"):
        fitted.score(masked)


def test_rows_that_make_no_batch_are_explained():
    model = build("gpt2")
    with pytest.raises(ValueError, match=r"made no batch of 3 rows of train_dataset .* needs? a collator that pads"):
        GradDot(model, progress=False).fit(text_rows(3, ragged_labels=False))
    for wrong in ("text", {"input_ids": [[1, 2]]}, iter([])):
        with pytest.raises(ValueError, match="train_dataset is a .*: give a datasets.Dataset or a list of rows"):
            GradDot(model, progress=False).fit(wrong)
    with pytest.raises(ValueError, match="partition is a str: give a Partition"):
        GradDot(model, partition="source", progress=False).fit(text_rows(3))
    with pytest.raises(ValueError, match="CheckpointEnsemble"):
        GradDot(["run/checkpoint-1"], progress=False).fit(text_rows(3))


def test_help_explains_the_settings_that_all_share():
    for kind in (GradDot, GradCos, Influence, Trak):
        assert "Settings of every estimator:" in kind.__doc__ and "store_dir:" in kind.__doc__
