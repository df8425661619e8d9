"""Members are what they say, and leave what they are made of as it was."""

import pytest
import torch
from models import build, class_rows, collate, dataset, text_rows
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from hf_datashapley import CheckpointEnsemble, DropoutEnsemble, GradDot, LoraEnsemble
from hf_datashapley.attribution.ensembles import Models, as_ensemble, model_fingerprint
from hf_datashapley.attribution.ensembles.masks import channel_mask
from hf_datashapley.ghost.capture import Capture
from hf_datashapley.ghost.units import Rows


def state_of(model):
    """All that could be left behind."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.grad is None, p.device) for name, p in model.named_parameters()],
        [
            {key: list(value) if isinstance(value, dict) else id(value) for key, value in vars(module).items()}
            for module in model.modules()
        ],
        model_fingerprint(model),
        str(model.config),
    )


def mixed(name, **settings):
    """A model with flags of all kinds."""
    model = build(name, **settings).train()
    next(model.modules()).training = False
    next(model.parameters()).requires_grad_(False)
    return model


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def summed(logits_BTV, labels_BT):
    """The tokens' losses in the logits' own precision; models of transformers compute theirs in float32."""
    return nn.functional.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), labels_BT[:, 1:], reduction="sum")


@pytest.fixture(scope="module")
def rows():
    return text_rows(6, ragged_labels=False)


def args(folder):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )


def trained(model, rows, folder, **settings):
    return LoraEnsemble.train(
        model, dataset(rows), **{"members": 2, **settings}, args=args(folder), data_collator=collate
    )


ENSEMBLES = {
    "models": lambda model, rows, folder: Models([model]),
    "dropout": lambda model, rows, folder: DropoutEnsemble(model, passes=2, p=0.2),
    "lora": trained,
}


@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_models_are_left_as_they_were(kind, name, rows, tmp_path):
    model = mixed(name)
    before, random = state_of(model), torch.get_rng_state()
    ensemble = ENSEMBLES[kind](model, rows, tmp_path)
    assert state_of(model) == before
    batch, seen = collate(rows[:2]), []
    for member in ensemble:
        assert not any(module.training for module in member.modules())
        seen.append(logits(member, batch))
    assert state_of(model) == before
    assert len(seen) == len(ensemble) == len(set(ensemble.fingerprints()))
    for again, first in zip(ensemble.outputs(), seen, strict=True):
        assert torch.equal(logits(again, batch), first)
    for index, one in enumerate(seen):
        assert all(not torch.equal(one, other) for other in seen[:index])
    with pytest.raises(RuntimeError, match="stop"):
        for _ in ensemble:
            raise RuntimeError("stop")
    assert state_of(model) == before
    started = iter(ensemble)
    next(started)
    started.close()
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)


# Dropout


def masked_by_hand(name, model, p, key):
    """The same network with each mask written into the layers before it: a column of weights and its bias scaled."""
    places = {
        "gpt2": {
            "transformer.h.{}.attn.resid_dropout": "transformer.h.{}.attn.c_proj",
            "transformer.h.{}.mlp.dropout": "transformer.h.{}.mlp.c_proj",
        },
        "neox": {
            "gpt_neox.layers.{}.post_attention_dropout": "gpt_neox.layers.{}.attention.dense",
            "gpt_neox.layers.{}.post_mlp_dropout": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        },
        "llama": {
            "model.layers.{}.self_attn": "model.layers.{}.self_attn.o_proj",
            "model.layers.{}.mlp": "model.layers.{}.mlp.down_proj",
        },
    }[name]
    scales = {}
    for layer in range(2):
        for place, linear in places.items():
            mask = channel_mask(16, p, f"{key} {place.format(layer)}")
            module = model.get_submodule(linear.format(layer))
            scales[f"{linear.format(layer)}.weight"] = mask if name == "gpt2" else mask[:, None]
            if module.bias is not None:
                scales[f"{linear.format(layer)}.bias"] = mask
    tables = {"gpt2": ["transformer.wte.weight", "transformer.wpe.weight"], "neox": ["gpt_neox.embed_in.weight"]}
    place = {"gpt2": "transformer.drop", "neox": "gpt_neox.emb_dropout"}
    for table in tables.get(name, []):
        scales[table] = channel_mask(16, p, f"{key} {place[name]}")
    return scales


def test_a_mask_keeps_its_share_and_its_mean():
    mask_ND = torch.stack([channel_mask(4000, 0.25, str(number)) for number in range(20)])
    assert mask_ND.dtype == torch.float64
    assert set(mask_ND.unique().tolist()) == {0.0, 1 / 0.75}
    # 80,000 draws: the mean's deviation is sqrt(1/3 / 80000) = 0.002
    assert abs(mask_ND.mean() - 1) < 0.01


@pytest.mark.parametrize("name", ["gpt2-untied", "neox", "llama"])
def test_gradients_are_those_of_the_masked_network_for_every_row(name, rows):
    model = build(name, dtype=torch.float64)
    ensemble = DropoutEnsemble([build("llama"), model], passes=2, p=0.3, seed=5)
    member_number = 3  # model 1, pass 1
    scales = masked_by_hand(name.removesuffix("-untied"), model, 0.3, "5 1 1")
    batch = collate(rows)
    draw = torch.Generator().manual_seed(0)
    directions = {key: torch.randn(2, *p.shape, dtype=p.dtype, generator=draw) for key, p in model.named_parameters()}

    def truth(row):
        """By autograd, through the scaled weights, of a row that is alone and not padded."""
        own = {key: p.detach().clone().requires_grad_() for key, p in model.named_parameters()}
        used = {key: p * scales[key] if key in scales else p for key, p in own.items()}
        inputs = torch.tensor([row["input_ids"]])
        loss = summed(torch.func.functional_call(model.eval(), used, (inputs,)).logits, inputs)
        found = torch.autograd.grad(loss, list(own.values()))
        return torch.stack(
            [sum((g * directions[key][k]).sum() for key, g in zip(own, found, strict=True)) for k in range(2)]
        )

    expected = torch.stack([truth(row) for row in rows])
    for number, member in enumerate(ensemble):
        if number != member_number:
            continue
        capture, units = Capture(member), Rows(len(rows))
        with capture.attached(), capture.scoring(directions, units) as tap:
            summed(logits(member, batch), batch["labels"]).backward()
        assert tap.grad is not None
        torch.testing.assert_close(tap.grad, expected, rtol=1e-10, atol=1e-10)


def test_masks_are_the_same_in_every_batch_and_differ_otherwise(rows):
    model = build("gpt2", dropout=0.2, dtype=torch.float64)
    found = []
    for member in DropoutEnsemble([model, model], passes=2):
        whole = logits(member, collate(rows))
        for index, row in enumerate(rows):
            alone = logits(member, collate([row]))[0]
            torch.testing.assert_close(whole[index, : len(row["input_ids"])], alone)
        found.append(whole)
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


def test_forward_only_masks_outputs_alone(rows):
    model, batch = build("gpt2", dropout=0.2).eval(), collate(rows)
    ensemble = DropoutEnsemble(model, passes=3, forward_only=True)
    assert len(ensemble) == len(ensemble.fingerprints()) == 1
    plain = logits(model, batch)
    assert [torch.equal(logits(member, batch), plain) for member in ensemble] == [True]
    seen = [logits(masked, batch) for masked in ensemble.outputs()]
    members = [logits(member, batch) for member in DropoutEnsemble(model, passes=3)]
    assert all(torch.equal(one, other) for one, other in zip(seen, members, strict=True))
    assert not any(torch.equal(one, plain) for one in seen)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_no_dropout_is_refused(name):
    with pytest.raises(ValueError, match=r"p=0\.1"):
        DropoutEnsemble(build(name))


def test_attention_dropout_does_not_count():
    model = build("gpt2")
    for layer in model.transformer.h:
        layer.attn.attn_dropout.p = 0.5
    with pytest.raises(ValueError, match="attention"):
        DropoutEnsemble(model)
    with pytest.raises(ValueError, match="attention"):
        DropoutEnsemble(build("llama", dropout=0.3))


def test_what_dropout_cannot_be_put_into_is_refused():
    with pytest.raises(ValueError, match="Sequential"):
        DropoutEnsemble(nn.Sequential(nn.Linear(3, 3)), p=0.1)
    for p in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="p="):
            DropoutEnsemble(build("gpt2"), p=p)
    with pytest.raises(ValueError, match="DropoutEnsemble"):
        DropoutEnsemble(DropoutEnsemble(build("gpt2"), p=0.1), p=0.1)


# LoRA


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_adapters_are_saved_and_loaded_to_the_bit(name, rows, tmp_path):
    models = [build(name), build(name, seed=1)]
    ensemble = trained(models, rows, tmp_path / "training")
    ensemble.save(tmp_path / "kept")
    again = LoraEnsemble.load(tmp_path / "kept", models)
    elsewhere = LoraEnsemble.load([tmp_path / "kept" / f"member-{k}" for k in range(4)], models)
    assert again.fingerprints() == ensemble.fingerprints() == elsewhere.fingerprints()
    assert again.cost == ensemble.cost

    def gradients(ensemble):
        found = []
        for member in ensemble:
            assert all(("lora_" in key) == p.requires_grad for key, p in member.named_parameters())
            own = [p for p in member.parameters() if p.requires_grad]
            found.append(torch.autograd.grad(member(**collate(rows)).loss, own))
        return found

    for first, second, third in zip(*map(gradients, (ensemble, again, elsewhere)), strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))
        assert all(own.any() for own in first)
    with pytest.raises(ValueError, match="other models"):
        LoraEnsemble.load(tmp_path / "kept", models[::-1])
    with pytest.raises(ValueError, match="evenly"):
        LoraEnsemble.load([tmp_path / "kept" / "member-0"], models)


def test_untrained_adapters_are_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="untrained"):
        LoraEnsemble.load([tmp_path], build("llama"))


@pytest.mark.parametrize(
    "setting", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"target_parameters": ["mlp.weight"]}]
)
def test_adapters_that_change_the_base_are_refused(setting, rows, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], **setting)
    with pytest.raises(ValueError, match="lora_config"):
        trained(build("llama"), rows, tmp_path, lora_config=config)


def test_scores_of_adapters_are_their_gradients(rows, tmp_path):
    """Per-row scores through the capture against autograd, row by row."""
    batch = collate(rows)
    for member in trained(build("gpt2", dtype=torch.float64), rows, tmp_path):
        capture, units = Capture(member), Rows(len(rows))
        directions = {key: p.detach()[None].clone() for key, p in capture.parameters.items()}
        with capture.attached(), capture.scoring(directions, units) as tap:
            summed(logits(member, batch), batch["labels"]).backward()
        for index, row in enumerate(rows):
            alone = collate([row])
            loss = summed(logits(member, alone), alone["labels"])
            found = torch.autograd.grad(loss, list(capture.parameters.values()))
            expected = sum((g * directions[key][0]).sum() for key, g in zip(directions, found, strict=True))
            torch.testing.assert_close(tap.grad[index, 0], expected, rtol=1e-9, atol=1e-12)


# Checkpoints and plain models


def test_checkpoints_are_models_in_order(rows, tmp_path):
    models = [build("gpt2"), build("gpt2", seed=1)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"checkpoint-{number}")
    ensemble = CheckpointEnsemble([tmp_path / "checkpoint-0", tmp_path / "checkpoint-1"], device="cpu")
    batch = collate(rows)
    for member, model in zip(ensemble, models, strict=True):
        assert torch.equal(logits(member, batch), logits(model.eval(), batch))
    assert len(set(ensemble.fingerprints())) == len(ensemble) == 2
    assert "2 models trained in a time that is not known" in str(ensemble.cost)
    assert ensemble.cost.model_bytes > 2 * sum(p.numel() for p in models[0].parameters()) * 4


def test_an_adapters_folder_is_a_checkpoint_whose_adapter_trains(rows, tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = build("llama").from_pretrained(tmp_path / "base")
    ensemble = trained(base, rows, tmp_path / "training", members=1)
    ensemble.save(tmp_path / "kept")
    checkpoints = CheckpointEnsemble([tmp_path / "kept" / "member-0"], device="cpu")
    for member, own in zip(checkpoints, ensemble, strict=True):
        assert torch.equal(logits(member, collate(rows)), logits(own, collate(rows)))
        assert all(("lora_" in key) == p.requires_grad for key, p in member.named_parameters())


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for paths, words in (([], "empty"), ([tmp_path / "nothing"], "nothing"), (str(tmp_path), "one folder")):
        with pytest.raises(ValueError, match=words):
            CheckpointEnsemble(paths)


def test_a_model_and_a_list_are_ensembles():
    model = build("gpt2")
    ensemble = DropoutEnsemble(model, p=0.1)
    assert as_ensemble(ensemble) is ensemble
    assert len(as_ensemble(model)) == 1
    assert len(as_ensemble([model, build("llama")])) == 2
    with pytest.raises(ValueError, match="empty"):
        as_ensemble([])


def test_fingerprints_know_every_number():
    model = build("llama")
    first = model_fingerprint(model)
    assert first == model_fingerprint(build("llama"))
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert model_fingerprint(model) != first


def test_adapters_of_a_classifier(tmp_path):
    model = build("llama-classifier")
    before = state_of(model)
    ensemble = trained(model, class_rows(6), tmp_path, members=1)
    assert len(GradDot(ensemble, data_collator=collate, progress=False).fit(class_rows(4)).score(class_rows(2))) == 4
    assert state_of(model) == before
