"""What cannot be valued exactly is refused by name, with the cure, before anything is trained."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DDPCommunicationHookType
from datasets import Dataset
from models import build, collate, dataset, text_rows
from peft import IA3Config, PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_datashapley import ShapleyConfig, ShapleyTrainer, load_updates
from hf_datashapley.ghost.capture import Capture
from hf_datashapley.ghost.units import Rows


def trainer(tmp_path, *, model=None, rows=8, validation="rows", collator=collate, optimizers=(None, None), **settings):
    table = dataset(text_rows(8)) if rows == 8 else rows
    return ShapleyTrainer(
        build("gpt2") if model is None else model,
        ShapleyConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, **settings),
        train_dataset=table,
        validation_dataset=dataset(text_rows(4, seed=2)) if isinstance(validation, str) else validation,
        data_collator=collator,
        optimizers=optimizers,
    )


@pytest.mark.parametrize(
    "settings, named, cure",
    [
        ({"use_liger_kernel": True}, "use_liger_kernel", "use_liger_kernel=False"),
        ({"parallelism_config": ParallelismConfig()}, "parallelism_config", "whole model"),
        ({"optim": "adagrad"}, "Adagrad", "value_optimizer='sgd'"),
        ({"value_order": "third"}, "value_order='third'", "path"),
        ({"value_order": "path", "path_nodes": 0}, "path_nodes=0", "at least 1"),
        ({"value_optimizer": "sgd", "optim": "adagrad", "audit_steps": 1}, "Adagrad", "without audit_steps"),
        (
            {"value_order": "path", "path_slope": "owen", "value_momentum": "unrolled"},
            "path_slope='owen'",
            "value_momentum='immediate'",
        ),
        ({"path_slope": "tangent"}, "path_slope='tangent'", "owen"),
        ({"second_pass": "third"}, "second_pass='third'", "replay"),
        ({"audit_steps": -1}, "audit_steps=-1", "0 for no audit"),
        ({"value_order": "second", "optim": "adagrad"}, "Adagrad", "value_optimizer='sgd'"),
        ({"value_order": "second", "fp16": True}, "value_order='second' under fp16", "value_order='path'"),
        ({"value_order": "path", "optim": "adagrad"}, "Adagrad", "value_optimizer='sgd'"),
        ({"value_order": "path", "validation_interval": 2}, "value_order='path'", "validation_interval=1"),
        ({"value_order": "second", "validation_interval": 2}, "value_order='second'", "validation_interval=1"),
        (
            {"value_order": "path", "path_slope": "owen", "value_modules": ["c_fc"]},
            "path_slope='owen'",
            "value_modules=None",
        ),
        ({"value_unit": "row"}, "value_unit='row'", "sample"),
        ({"value_kernel": "gram"}, "value_kernel='gram'", "fused"),
        ({"value_optimizer": "adam"}, "value_optimizer='adam'", "sgd"),
        ({"value_momentum": "none"}, "value_momentum='none'", "unrolled"),
        ({"validation_batch_size": 0}, "validation_batch_size=0", "at least 1"),
        ({"validation_interval": 0}, "validation_interval=0", "at least 1"),
        ({"value_modules": ["c_typo"]}, "c_typo", "value_modules"),
    ],
)
def test_settings(tmp_path, settings, named, cure):
    with pytest.raises(ValueError, match=named) as error:
        trainer(tmp_path, **settings)
    assert cure in str(error.value)


def test_a_layer_with_a_parameter_of_its_own_kind_is_not_covered():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    model[0].extra = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="0.extra.*value_modules"):
        Capture(model)


def test_a_loss_function_that_needs_the_count(tmp_path):
    def loss(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        summed = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return summed / num_items_in_batch

    plain = trainer(tmp_path / "plain", max_steps=2, optim="sgd")
    custom = ShapleyTrainer(
        build("gpt2"),
        ShapleyConfig(
            output_dir=str(tmp_path / "custom"),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            max_steps=2,
            optim="sgd",
        ),
        train_dataset=dataset(text_rows(8)),
        validation_dataset=dataset(text_rows(4, seed=2)),
        data_collator=collate,
        compute_loss_func=loss,
    )
    losses = []
    for run in (plain, custom):
        run.train()
        losses.append(load_updates(run.value_dir)["validation_loss"][:])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_that_fails_before_its_first_update_leaves_no_ledger(tmp_path):
    def fail(outputs, labels, num_items_in_batch=None):
        raise RuntimeError("of the user's")

    run = trainer(tmp_path)
    run.compute_loss_func = fail
    with pytest.raises(RuntimeError, match="of the user's"):
        run.train()
    trainer(tmp_path, max_steps=1).train()


def test_a_loader_of_ones_own(tmp_path):
    class Own(ShapleyTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(text_rows(8), batch_size=2, collate_fn=collate)

    run = trainer(tmp_path)
    run.__class__ = Own
    with pytest.raises(ValueError, match="get_train_dataloader was overridden.*data_collator"):
        run.train()


@pytest.mark.parametrize(
    "setting, value, named, cure",
    [
        ("fsdp", True, "FSDP", "leave `fsdp` unset"),
        ("deepspeed", "zero.json", "DeepSpeed", "leave `deepspeed` unset"),
        ("_n_gpu", 2, "DataParallel", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_launches_that_this_machine_cannot_make(tmp_path, setting, value, named, cure):
    """Set after TrainingArguments has looked at them, which wants the hardware or the package."""
    args = ShapleyConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    _ = args.device  # settles the number of GPUs
    setattr(args, setting, value)
    rows = dataset(text_rows(4))
    with pytest.raises(ValueError, match=named) as error:
        ShapleyTrainer(build("gpt2"), args, train_dataset=rows, validation_dataset=rows, data_collator=collate)
    assert cure in str(error.value)


class Compressing(ShapleyTrainer):
    """DDP has settings that no training argument sets."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.ddp_handler.comm_hook = DDPCommunicationHookType.BF16


@pytest.mark.parametrize(
    "trainer_class, settings, named, cure",
    [
        (ShapleyTrainer, {"auto_find_batch_size": True}, "auto_find_batch_size in several", "per_device_train_batch"),
        (
            ShapleyTrainer,
            {"accelerator_config": {"even_batches": False}},
            "even_batches=False in several",
            "dataloader_drop_last=True",
        ),
        (Compressing, {}, "communication hook bf16", "comm_hook"),
    ],
)
def test_what_goes_in_one_process_only(tmp_path, monkeypatch, trainer_class, settings, named, cure):
    args = ShapleyConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings)
    rows = dataset(text_rows(4))
    for processes in (1, 2):
        monkeypatch.setattr(Accelerator, "num_processes", property(lambda self, count=processes: count))
        expected = pytest.raises(ValueError, match=named) if processes == 2 else nullcontext()
        with expected as error:
            trainer_class(build("gpt2"), args, train_dataset=rows, validation_dataset=rows, data_collator=collate)
    assert cure in str(error.value)


def test_plain_training_arguments(tmp_path):
    with pytest.raises(ValueError, match="give a ShapleyConfig"):
        ShapleyTrainer(build("gpt2"), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_tokens_that_are_no_samples(tmp_path):
    model = get_peft_model(build("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PROMPT_TUNING.*LoraConfig"):
        trainer(tmp_path, model=model)


def test_an_adapter_that_no_rule_covers(tmp_path):
    model = get_peft_model(build("llama"), IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="no rule covers.*v_proj"):
        trainer(tmp_path, model=model)


def test_weights_in_float16(tmp_path):
    with pytest.raises(ValueError, match="float16.*dtype=torch.bfloat16.*dtype=torch.float32 and set fp16=True"):
        trainer(tmp_path, model=build("llama", dtype=torch.float16))


def test_weights_in_bf16_under_fp16(tmp_path):
    with pytest.raises(ValueError, match="fp16 with parameters in torch.bfloat16.*bf16=True"):
        trainer(tmp_path, model=build("llama", dtype=torch.bfloat16), fp16=True)


def test_a_collator_that_packs_rows_is_noticed_in_the_first_step(tmp_path):
    def pack(rows):
        batch = collate(rows)
        return {key: batch[key].reshape(1, -1) for key in ("input_ids", "labels")}

    run = trainer(
        tmp_path, model=build("llama"), collator=pack, validation=text_rows(1), per_device_train_batch_size=2
    )
    with pytest.raises(ValueError, match="made 1 rows of input_ids from 2 samples.*or DataCollatorWithFlattening"):
        run.train()


@pytest.mark.parametrize("rows, named", [(None, "missing"), (Dataset.from_list([]), "empty")])
def test_training_rows(tmp_path, rows, named):
    with pytest.raises(ValueError, match=f"train_dataset is {named}"):
        trainer(tmp_path, rows=rows)


UNLABELLED = [{"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}] * 3


@pytest.mark.parametrize(
    "validation, named",
    [
        (None, "validation_dataset is missing"),
        ({}, "validation_dataset is missing"),
        ({"code": None}, r"validation_dataset\['code'\] is missing"),
        (Dataset.from_list([]), "validation_dataset is empty"),
        ({"code": []}, r"validation_dataset\['code'\] is empty"),
        (UNLABELLED, "every label of every row is -100"),
        ({"prose": UNLABELLED}, r"validation_dataset\['prose'\]: every label"),
        ({"": text_rows(2)}, "give each a name"),
        ({3: text_rows(2)}, "give each a name"),
        (dataset(text_rows(2)).to_iterable_dataset(), "iterable validation_dataset"),
    ],
)
def test_validation_rows(tmp_path, validation, named):
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, validation=validation)


def test_validation_rows_whose_only_label_is_the_first_token(tmp_path):
    """A causal model never predicts the first token, so such a row has no loss."""
    rows = [{"input_ids": [3, 4, 5], "labels": [3, -100, -100]}]
    with pytest.raises(ValueError, match="every label of every row is -100"):
        trainer(tmp_path, validation=rows)


def test_unlabelled_validation_batches(tmp_path):
    def without_labels(rows):
        return {key: value for key, value in collate(rows).items() if key != "labels"}

    with pytest.raises(ValueError, match="no labels after the data collator.*mlm=False"):
        trainer(tmp_path, collator=without_labels)


def test_unlabelled_validation_rows_are_not_drawn(tmp_path):
    run = trainer(tmp_path, validation=[*UNLABELLED, *text_rows(2)], validation_batch_size=2)
    assert {int(row) for step in range(1, 9) for row in run.validation_rows(step)[""]} == {3, 4}


@pytest.mark.parametrize("setting", ["amsgrad", "maximize"])
def test_optimizer_settings(tmp_path, setting):
    model = build("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), **{setting: True})
    with pytest.raises(ValueError, match=f"{setting}=True.*value_optimizer='sgd'"):
        trainer(tmp_path, model=model, optimizers=(optimizer, None))


def test_positions_without_a_batch_dimension(tmp_path):
    """With as many positions as samples, the one could be taken for the other."""

    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(8, 4)

        def forward(self, x):
            return x + self.table(torch.arange(x.shape[1]))

    model = Positions()
    capture = Capture(model)
    directions = {name: torch.ones(1, *p.shape) for name, p in capture.parameters.items()}
    with capture.attached(), capture.scoring(directions, Rows(3)):
        with pytest.raises(ValueError, match="table: its input has no batch dimension.*value_modules"):
            model(torch.randn(3, 3, 4))


def test_a_module_that_the_loss_never_reaches_has_no_value(tmp_path):
    model = build("gpt2")
    model.spare = torch.nn.Linear(3, 3)
    run = trainer(tmp_path, model=model, value_modules=["spare"], max_steps=2, optim="sgd")
    run.train()
    assert set(run.values()["value"]) == {0.0}


def test_an_unknown_optimizer_that_was_passed_in(tmp_path):
    model = build("gpt2")
    with pytest.raises(ValueError, match="not RMSprop.*value_optimizer='sgd'"):
        trainer(tmp_path, model=model, optimizers=(torch.optim.RMSprop(model.parameters()), None))


def test_the_proxy_takes_any_optimizer(tmp_path):
    run = trainer(tmp_path, optim="adagrad", value_optimizer="sgd", max_steps=2)
    run.train()
    assert any(run.values()["value"])


def test_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint=True.*no checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


class Regularised(LlamaForCausalLM):
    """Reads a weight outside of its layer: those samples' share of the gradient is not seen by the layer."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        output.loss = output.loss + self.lm_head.weight.square().sum()
        return output


def test_a_parameter_used_outside_of_its_layer_is_noticed(tmp_path):
    model = Regularised(build("llama").config)
    run = trainer(tmp_path, model=model, optim="sgd")
    with pytest.raises(RuntimeError, match="outside of its layer's forward.*value_modules"):
        run.train()


class FusedHead(LlamaForCausalLM):
    """What Liger's patch makes of a model: in training the loss takes the head's weight, and the head never runs."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if not self.training:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = torch.nn.functional.linear(hidden, self.lm_head.weight)
        return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, self.config.vocab_size, **kwargs))


@pytest.mark.parametrize("settings", [{"optim": "sgd"}, {}, {"value_order": "path"}], ids=["sgd", "adamw", "path"])
def test_a_fused_loss_that_was_patched_in_by_hand_is_noticed(tmp_path, settings):
    """In the first update that has values."""
    run = trainer(tmp_path, model=FusedHead(build("llama").config), **settings)
    with pytest.raises(RuntimeError, match="a fused loss.*value_modules"):
        run.train()
    assert run.state.global_step <= 1


def test_a_fused_loss_whose_head_is_frozen_is_no_obstacle(tmp_path):
    model = FusedHead(build("llama").config)
    model.lm_head.requires_grad_(False)
    run = trainer(tmp_path, model=model, optim="sgd", max_steps=2)
    run.train()
    assert any(run.values()["value"])
