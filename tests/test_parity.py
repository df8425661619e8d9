"""Turning valuation on changes nothing that the user can see in training: runs are compared with plain `Trainer`."""

import copy
import inspect
import pickle
import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from models import build, collate, dataset, text_rows
from oracles import relative_error
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_datashapley import ShapleyConfig, ShapleyTrainer


class Flags(TrainerCallback):
    """Notes every module's train or eval flag at the end of each update, and the random states at the end of all."""

    def __init__(self):
        self.flags = []
        self.random_states = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.flags.append([module.training for module in model.modules()])

    def on_train_end(self, args, state, control, **kwargs):
        self.random_states = random_states()


def drawing_collate(rows):
    """Draws from every global generator, as masking collators do; validation must not shift what training draws."""
    batch = collate(rows)
    dropped = torch.rand(batch["labels"].shape) < 0.1 * (random.random() + np.random.rand())
    return {**batch, "labels": batch["labels"].masked_fill(dropped, -100)}


def random_states():
    numpy_state = [np.asarray(part).tolist() for part in np.random.get_state()]
    return [torch.get_rng_state().tolist(), random.getstate(), numpy_state]


def train(folder, trainer_class, model_name, *, frozen=(), dtype=torch.float32, **settings):
    """10 updates with dropout, clipping, warm-up and accumulation 2; returns the trainer and its `Flags`."""
    model = build(model_name, dropout=0.1, dtype=dtype)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    values = {}
    if trainer_class is ShapleyTrainer:
        values = {
            "validation_dataset": {"a": dataset(text_rows(5, seed=8)), "b": dataset(text_rows(4, seed=9))},
            "train_dataset": dataset(text_rows(40), ids=range(100, 140)),
        }
        config = ShapleyConfig
    else:
        values = {"train_dataset": dataset(text_rows(40))}
        config = TrainingArguments
        own = {field.name for field in fields(TrainingArguments)}
        settings = {key: value for key, value in settings.items() if key in own}
    flags = Flags()
    arguments = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        **settings,
    }
    trainer = trainer_class(
        model=model,
        args=config(output_dir=str(folder / trainer_class.__name__), **arguments),
        data_collator=drawing_collate,
        callbacks=[flags],
        eval_dataset=dataset(text_rows(7, seed=10)),
        **values,
    )
    trainer.train()
    return trainer, flags


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def both(folder, model_name, **settings):
    ours, our_flags = train(folder, ShapleyTrainer, model_name, **settings)
    plain, plain_flags = train(folder, Trainer, model_name, **settings)
    assert ours.state.global_step == plain.state.global_step
    assert our_flags.flags == plain_flags.flags
    assert our_flags.random_states == plain_flags.random_states
    assert logged(ours, "learning_rate") == logged(plain, "learning_rate")
    assert [module.training for module in ours.model.modules()] == [m.training for m in plain.model.modules()]
    return ours, plain


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("model_name", ["gpt2", "llama", "neox"])
def test_project_kernel_leaves_the_run_bit_identical(tmp_path, model_name, optim):
    ours, plain = both(tmp_path, model_name, value_kernel="project", optim=optim)
    assert len(logged(plain, "loss")) == 10
    assert logged(ours, "loss") == logged(plain, "loss")
    assert logged(ours, "grad_norm") == logged(plain, "grad_norm")
    for (name, weight), truth in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(weight, truth), name


TWO_PASSES = {
    "second": {"value_order": "second"},
    "path": {"value_order": "path", "path_nodes": 2},
    "owen": {"value_order": "path", "path_slope": "owen"},
}


@pytest.mark.parametrize("second_pass", ["stash", "replay"])
@pytest.mark.parametrize("order", TWO_PASSES.values(), ids=TWO_PASSES)
def test_orders_of_two_passes_leave_the_run_bit_identical(tmp_path, order, second_pass):
    """Validation at other weights, replays, audits: the weights are the optimizer's, bit for bit."""
    ours, plain = both(tmp_path, "gpt2", value_kernel="project", second_pass=second_pass, audit_steps=3, **order)
    assert logged(ours, "loss") == logged(plain, "loss")
    assert logged(ours, "grad_norm") == logged(plain, "grad_norm")
    for (name, weight), truth in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(weight, truth), name


@pytest.mark.parametrize("order", TWO_PASSES.values(), ids=TWO_PASSES)
def test_orders_of_two_passes_with_the_fused_kernel(tmp_path, order):
    ours, plain = both(tmp_path, "llama", value_kernel="fused", second_pass="stash", **order)
    assert relative_error(logged(ours, "loss"), logged(plain, "loss")) <= 1e-5
    assert relative_error(flat(ours.model), flat(plain.model)) <= 1e-3


@pytest.mark.parametrize("model_name", ["gpt2", "gpt2-untied", "llama", "neox"])
def test_fused_kernel_leaves_the_run_the_same_up_to_rounding(tmp_path, model_name):
    ours, plain = both(tmp_path, model_name, value_kernel="fused")
    losses = torch.tensor(logged(ours, "loss"), dtype=torch.float64)
    truth = torch.tensor(logged(plain, "loss"), dtype=torch.float64)
    assert len(losses) == 10
    assert ((losses - truth).abs() / truth).max() <= 1e-5
    assert relative_error(flat(ours.model), flat(plain.model)) <= 1e-3


@pytest.mark.parametrize("kernel", ["fused", "project"])
def test_frozen_layers_stay_bit_identical(tmp_path, kernel):
    """And get no gradient."""
    frozen = ("transformer.wpe", "transformer.h.0.mlp.c_fc")
    ours, plain = both(tmp_path, "gpt2", value_kernel=kernel, frozen=frozen, num_train_epochs=1)
    for name in frozen:
        for weight, truth in zip(
            ours.model.get_submodule(name).parameters(), plain.model.get_submodule(name).parameters(), strict=True
        ):
            assert torch.equal(weight, truth)
            assert weight.grad is None


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_the_samplers_see_the_same_rows(tmp_path, strategy):
    ours, plain = both(tmp_path, "gpt2", value_kernel="project", train_sampling_strategy=strategy, num_train_epochs=1)
    assert logged(ours, "loss") == logged(plain, "loss")


@pytest.mark.parametrize("kernel", ["fused", "project"])
def test_evaluation_in_between_is_that_of_plain_trainer(tmp_path, kernel):
    """Evaluation runs the captured layers outside of scoring; batch size and rows differ from training's."""
    ours, plain = both(
        tmp_path,
        "llama",
        value_kernel=kernel,
        num_train_epochs=1,
        eval_strategy="steps",
        eval_steps=2,  # and once more at the end
        per_device_eval_batch_size=3,
    )
    assert len(logged(plain, "eval_loss")) == 3
    losses, truth = logged(ours, "eval_loss"), logged(plain, "eval_loss")
    assert losses == truth if kernel == "project" else relative_error(losses, truth) <= 1e-5


@pytest.mark.parametrize("kernel", ["fused", "project"])
@pytest.mark.parametrize("model_name", ["gpt2", "llama"])
def test_the_model_is_left_as_plain_trainer_leaves_it(tmp_path, model_name, kernel):
    """No attribute, hook or class stays behind; the model can be copied and pickled, and its copies stand alone."""
    ours, plain = both(tmp_path, model_name, value_kernel=kernel, max_steps=2)
    for (name, module), other in zip(ours.model.named_modules(), plain.model.modules(), strict=True):
        assert type(module) is type(other), name
        assert set(vars(module)) == set(vars(other)), name
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert len(getattr(module, hooks)) == len(getattr(other, hooks)), name
    model = ours.model.eval()
    batch = {key: value for key, value in collate(text_rows(3)).items() if key != "labels"}
    logits = model(**batch).logits
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(**batch).logits, logits)
    assert torch.equal(loaded(**batch).logits, logits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(**batch).logits, logits)
    assert torch.equal(loaded(**batch).logits, logits)


@pytest.mark.parametrize("kernel", ["fused", "project"])
def test_a_model_copied_during_training_is_an_ordinary_model(tmp_path, kernel):
    """As averaging callbacks do: the copy runs its own weights, also after the original's have moved on."""
    copies = []

    class Copying(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)])

    trainer = ShapleyTrainer(
        model=build("gpt2"),
        args=ShapleyConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            value_kernel=kernel,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=dataset(text_rows(8)),
        validation_dataset=dataset(text_rows(3, seed=8)),
        data_collator=collate,
        callbacks=[Copying()],
    )
    trainer.train()
    batch = {key: value for key, value in collate(text_rows(3)).items() if key != "labels"}
    copied, loaded, reference = (model.eval() for model in copies)
    fresh = build("gpt2").eval()
    fresh.load_state_dict(reference.state_dict())
    for model in (copied, loaded):
        assert torch.equal(model(**batch).logits, fresh(**batch).logits)
        assert not torch.equal(model(**batch).logits, trainer.model.eval()(**batch).logits)
        model.train()(**batch).logits.sum().backward()


def test_model_is_restored_when_training_fails(tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    left = {}
    for trainer_class, config in ((Trainer, TrainingArguments), (ShapleyTrainer, ShapleyConfig)):
        model = build("gpt2")
        values = {"validation_dataset": dataset(text_rows(3, seed=8))} if trainer_class is ShapleyTrainer else {}
        trainer = trainer_class(
            model=model,
            args=config(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True),
            train_dataset=dataset(text_rows(8)),
            data_collator=collate,
            callbacks=[Failing()],
            **values,
        )
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        left[trainer_class] = [(type(module), set(vars(module))) for module in model.modules()]
    assert left[ShapleyTrainer] == left[Trainer]


# The private methods of Trainer that ShapleyTrainer relies on. A change of one is to be read before these are updated.
PRIVATE = {
    "_inner_training_loop": "(self, batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)",
    "_run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "_save_rng_state": "(self, output_dir)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
    "_finish_current_push": "(self)",
    "_get_dataloader": "(self, dataset, description, batch_size, sampler_fn, is_training, dataloader_key)",
    "_clip_grad_norm": "(self, model)",
    "_save_checkpoint": "(self, model, trial)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
    "_remove_unused_columns": "(self, dataset, description)",
    "_get_collator_with_removed_columns": "(self, data_collator, description)",
    "_prepare_inputs": "(self, inputs)",
}


@pytest.mark.parametrize("method", PRIVATE)
def test_private_methods_of_trainer_are_those_we_know(method):
    parameters = inspect.signature(getattr(Trainer, method)).parameters
    assert "(" + ", ".join(parameters) + ")" == PRIVATE[method]


def test_no_other_private_method_of_trainer_is_overridden():
    overridden = {name for name in vars(ShapleyTrainer) if name.startswith("_") and name in vars(Trainer)}
    assert {name for name in overridden if not name.startswith("__")} <= set(PRIVATE)
