"""The packaged configurations of `accelerate launch` start what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from models import build, collate, dataset, text_rows

from hf_datashapley import ShapleyConfig, ShapleyTrainer
from hf_datashapley.cli.accelerate_config import CONFIGS, FOLDER
from hf_datashapley.cli.main import main


PROMISED = {
    "single_gpu": {"distributed_type": "NO", "num_processes": 1, "gpu_ids": "0", "use_cpu": False},
    # -1: accelerate asks for --num_processes.
    "multi_gpu": {"distributed_type": "MULTI_GPU", "num_processes": -1, "gpu_ids": "all", "use_cpu": False},
    "cpu_processes": {"distributed_type": "MULTI_GPU", "num_processes": 2, "gpu_ids": "all", "use_cpu": True},
}


def path_of(name, capsys):
    """What a shell puts into the command: all of stdout."""
    assert main(["accelerate_config", name]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.count("\n") == 1
    return shown.out.rstrip("\n")


def test_every_file_has_a_name():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(f"{name}.yaml" for name in CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_accelerate_reads(name, capsys):
    config = load_config_from_file(path_of(name, capsys))
    common = {"mixed_precision": "no", "num_machines": 1, "machine_rank": 0}
    read = config.to_dict()
    assert {key: read[key] for key in PROMISED[name] | common} == PROMISED[name] | common
    for plugin in ("dynamo_config", "fsdp_config", "deepspeed_config", "megatron_lm_config", "parallelism_config"):
        assert not vars(config)[plugin]


def launched(*arguments):
    """The arguments of `accelerate launch` once it has read its configuration."""
    return _validate_launch_command(launch_command_parser().parse_args([*arguments, "train.py"]))[0]


def test_several_gpus_have_to_be_counted(capsys):
    config = ["--config_file", path_of("multi_gpu", capsys)]
    with pytest.raises(ValueError, match="--num_processes"):
        launched(*config)
    arguments = launched(*config, "--num_processes", "4")
    assert arguments.multi_gpu and arguments.num_processes == 4 and arguments.dynamo_backend == "no"


def test_options_stand_above_the_file(capsys):
    arguments = launched("--config_file", path_of("single_gpu", capsys), "--gpu_ids", "3", "--mixed_precision", "bf16")
    assert (arguments.gpu_ids, arguments.mixed_precision, arguments.num_processes) == ("3", "bf16", 1)
    assert not arguments.multi_gpu


WORKER = """
import os, sys
import torch
from models import build, collate, dataset, text_rows
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser

from hf_datashapley import ShapleyConfig, ShapleyTrainer


class Looking(ShapleyTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        assert isinstance(model, DistributedDataParallel), type(model)
        assert torch.distributed.get_backend() == "gloo"
        assert self.args.world_size == self.accelerator.num_processes == 2
        assert self.args.device.type == "cpu"
        assert self.accelerator.mixed_precision == "no"
        return super().training_step(model, inputs, num_items_in_batch)


(args,) = HfArgumentParser(ShapleyConfig).parse_args_into_dataclasses()
rows = dataset(text_rows(8))
trainer = Looking(build("gpt2"), args, train_dataset=rows, validation_dataset=rows, data_collator=collate)
trainer.train()
batches, valued = len(trainer.get_train_dataloader()), len(trainer.values())
print(f"rank {args.process_index} made {trainer.state.global_step} updates on {batches}, {valued} values")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_cpu_processes_train_together(tmp_path):
    """The command as its help gives it, in a shell. Each gets half of the 8 rows, and reads the values of all."""
    script = tmp_path / "train.py"
    script.write_text(WORKER)
    python = sys.executable
    command = f"""
        {python} -m accelerate.commands.launch \
        --config_file "$({python} -m hf_datashapley.cli accelerate_config cpu_processes)" {script} --use_cpu True \
        --output_dir {tmp_path / "out"} --report_to none --per_device_train_batch_size 2 --num_train_epochs 1 \
        --save_strategy no --disable_tqdm True
    """
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} made 2 updates on 2, 8 values" in done.stdout


def test_processes_that_would_train_by_themselves(tmp_path, monkeypatch):
    """What `cpu_processes` without `--use_cpu True` comes to: launched as one of two, and alone for accelerate."""
    args = ShapleyConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    _ = args.device  # settles that there is one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = dataset(text_rows(8))
    with pytest.raises(ValueError, match="one of 2 processes.*by itself.*--use_cpu True"):
        ShapleyTrainer(build("gpt2"), args, train_dataset=rows, validation_dataset=rows, data_collator=collate)


def test_help_says_what_each_is_for(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["accelerate_config", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for name, what in CONFIGS.items():
        assert name in shown and what in shown


@pytest.mark.parametrize(
    ("name", "hint"), [("multi_gpus", "did you mean multi_gpu?"), ("tpu", "single_gpu, multi_gpu")]
)
def test_an_unknown_name_is_refused_helpfully(name, hint, capsys):
    assert main(["accelerate_config", name]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and f"there is no configuration '{name}'" in shown.err and hint in shown.err
