"""Compiled runs (`torch_compile=True`, `accelerate launch --dynamo_backend`): the values are those of eager ones.

Most compile with backend "aot_eager", which traces forward and backward passes as "inductor" does, and runs torch's
own kernels. Rows are of one length where a test counts graphs: torch compiles once more when a length or a batch
changes.
"""

import copy
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from models import build, collate, dataset, text_rows
from oracles import relative_error
from prepared import config, prepare, two_groups
from recorder import Recorder, assert_history
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_datashapley import ShapleyTrainer, load_updates


FLOAT32 = 1e-5
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


class Watcher(Recorder):
    """Also notes how many graphs there were after each micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.graphs = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        assert isinstance(model, OptimizedModule) and not isinstance(self.model, OptimizedModule)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.graphs.append(counters["stats"]["unique_graphs"])
        return loss


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


def even_rows(count):
    return [row for row in text_rows(300) if len(row["input_ids"]) == 12][:count]


def compiled(folder, name, make_optimizer=None, **settings):
    """Two epochs of three updates of 2 x 2 rows; those and the validation rows are all of one length."""
    even = {"rows": even_rows(12), "validation_rows": even_rows(17)[12:]}
    chosen = {**even, "gradient_accumulation_steps": 2, **COMPILED, **settings}
    return prepare(folder, name, make_optimizer, trainer_class=Watcher, **chosen)


def assert_settled(trainer, graphs, micro_batches=2):
    """All compiling was done in the first update."""
    assert trainer.graphs[0] > 0, "nothing was compiled"
    assert set(trainer.graphs[micro_batches:]) == {graphs}, f"compiled again: {trainer.graphs}"


@pytest.mark.parametrize(("name", "kernel"), [("neox", "fused"), ("llama", "project")])
def test_values(tmp_path, name, kernel):
    """A graph for training, one for validation; none breaks; clipping, accumulation."""
    trainer, replay = compiled(tmp_path, name, two_groups(AdamW), value_kernel=kernel)
    trainer.train()
    assert assert_history(trainer, replay, FLOAT32) > 0
    assert len(trainer.updates) == 6 and any(clip < 1 for clip in load_updates(trainer.value_dir)["clip"])
    assert_settled(trainer, 2)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_batches_of_other_sizes_and_recomputed_activations(tmp_path):
    """A ragged last batch of rows of many lengths: shapes become variables, after which nothing is compiled."""
    trainer, replay = compiled(
        tmp_path,
        "llama",
        layers=1,  # torch compiles four times or more
        rows=text_rows(11),
        validation_rows=text_rows(5, seed=100),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        num_train_epochs=2,
    )
    trainer.train()
    assert {len(m.inputs["input_ids"]) for update in trainer.updates for m in update.micro_batches} == {2, 3}
    assert_history(trainer, replay, FLOAT32)
    first_epoch = len(trainer.graphs) // 2
    assert len(set(trainer.graphs[first_epoch:])) == 1 and trainer.graphs[-1] <= 6
    assert not counters["graph_break"]


@pytest.mark.slow
def test_bf16_autocast(tmp_path):
    """GPT-2's graph breaks at a warning of transformers, also without values."""
    trainer, replay = compiled(
        tmp_path, "gpt2", two_groups(SGD, momentum=0.9), layers=1, bf16=True, value_kernel="project", max_steps=2
    )
    replay.loss_tolerance = 1e-2
    trainer.train()
    assert assert_history(trainer, replay, 5e-2) > 1e-4, "this was not half precision"
    assert_settled(trainer, trainer.graphs[0])
    assert all("logging.Logger" in reason for reason in counters["graph_break"])


@pytest.mark.parametrize("order", ["path", "second"])
def test_orders_with_two_passes(tmp_path, order):
    """ "auto" is "replay": nothing is put aside. Order "second" differentiates twice, without compiled graphs."""
    trainer, replay = compiled(
        tmp_path, "neox", two_groups(SGD, momentum=0.9), value_order=order, max_steps=3, audit_steps=3
    )
    trainer.train()
    assert assert_history(trainer, replay, FLOAT32) > 0
    # Training; the replay that scores; the validation gradient and the audit's losses, where those are compiled.
    first, rest = trainer.graphs[0], trainer.graphs[-1]
    assert (first, rest) == (1, {"path": 3, "second": 2}[order])


class LooksAtTheModel(TrainerCallback):
    """Evaluates, saves and copies the model in the middle of a run."""

    def __init__(self, folder):
        self.folder = folder
        self.losses = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != 2:
            return
        rows = even_rows(6)
        self.losses.append(self.trainer.evaluate(dataset(rows))["eval_loss"])
        self.trainer.save_model(str(self.folder))
        for other in (copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(self.folder)):
            with torch.no_grad():
                self.losses.append(float(other.eval()(**collate(rows)).loss))


def test_a_model_in_the_middle_of_a_run_and_after_it(tmp_path, monkeypatch):
    """As `accelerate launch` asks for it; against plain `Trainer`, which compiles too."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    AcceleratorState._reset_state(reset_partial_state=True)
    models, losses = {}, {}
    for trainer_class in (Trainer, ShapleyTrainer):
        folder = tmp_path / trainer_class.__name__
        settings = {} if trainer_class is Trainer else {"validation_dataset": dataset(even_rows(4))}
        look = LooksAtTheModel(folder / "saved")
        trainer = trainer_class(
            build("llama"),
            config(folder, per_device_eval_batch_size=6, max_steps=4, gradient_accumulation_steps=1),
            train_dataset=dataset(even_rows(8)),
            data_collator=collate,
            callbacks=[look],
            **settings,
        )
        look.trainer = trainer
        trainer.train()
        assert isinstance(trainer.model_wrapped, OptimizedModule)
        models[trainer_class], losses[trainer_class] = trainer.model, look.losses
    mid_run, at_save, plain = losses[ShapleyTrainer], losses[ShapleyTrainer][0], losses[Trainer]
    assert len(mid_run) == 3 and relative_error(mid_run, [at_save] * 3) < 1e-6
    assert relative_error(mid_run, plain) < 1e-5
    for module, other in zip(models[Trainer].modules(), models[ShapleyTrainer].modules(), strict=True):
        assert vars(module).keys() == vars(other).keys() and module.training == other.training
    for weight, other in zip(models[Trainer].parameters(), models[ShapleyTrainer].parameters(), strict=True):
        assert relative_error(other, weight) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ here: no g++")
def test_inductor(tmp_path):
    """About half a minute where nothing was compiled before; torch keeps what it compiled on disk."""
    trainer, replay = compiled(tmp_path, "neox", torch_compile_backend="inductor", max_steps=3)
    trainer.train()
    assert assert_history(trainer, replay, FLOAT32) > 0
    assert_settled(trainer, 2)
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "settings, named, cure",
    [
        ({"torch_compile_backend": "cudagraphs"}, "torch_compile with backend cudagraphs", "'inductor'"),
        ({"torch_compile_mode": "reduce-overhead"}, "mode reduce-overhead", "torch_compile_mode='default'"),
        ({"label_smoothing_factor": 0.1}, "torch_compile with label_smoothing_factor", "label_smoothing_factor=0"),
        ({"value_order": "path", "second_pass": "stash"}, "second_pass='stash' with torch_compile", "'replay'"),
        ({"value_order": "path", "path_slope": "owen"}, "path_slope='owen' with torch_compile", "'secant'"),
    ],
)
def test_refused(tmp_path, settings, named, cure):
    with pytest.raises(ValueError, match=named) as error:
        prepare(tmp_path, **{**COMPILED, **settings})
    assert cure in str(error.value)


def test_regions_from_accelerate_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="by regions.*dynamo_use_regional_compilation false"):
        prepare(tmp_path)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_model_that_is_compiled_already(tmp_path, how):
    model = build("llama")
    if how == "wrapped":
        model = torch.compile(model)
    else:
        model.model.layers[0].compile()
    rows = dataset(even_rows(2))
    with pytest.raises(ValueError, match="compiled already.*torch_compile=True"):
        ShapleyTrainer(model, config(tmp_path), train_dataset=rows, validation_dataset=rows, data_collator=collate)
