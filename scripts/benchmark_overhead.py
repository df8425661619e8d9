"""What values cost: plain `Trainer`, the ceiling, and `ShapleyTrainer`, alternating in one process.

The ceiling is plain training and the same validation pass, nothing scored: no exact method can be faster. Each variant
trains blocks of updates in turn, so that whatever else the machine does hits all of them; an update's time is the
median over all blocks, and only ratios within one run are to be quoted. Peak memory is that of one block in a process
of its own, over a process that has imported everything and built the model.

    python scripts/benchmark_overhead.py                       # GPT-2 4x256, 8 + 1 rows of 256 tokens
    python scripts/benchmark_overhead.py --batch_size 16
    python scripts/benchmark_overhead.py --targets 8 --variants plain ceiling fused
    python scripts/benchmark_overhead.py --validation_interval 10 --updates 20
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

import hf_datashapley
from hf_datashapley import ShapleyConfig, ShapleyTrainer


@dataclass
class Setting:
    """What is measured."""

    family: str = field(default="gpt2", metadata={"help": "gpt2, pythia or llama."})
    layers: int = 4
    width: int = 256
    vocabulary: int = 8192
    length: int = field(default=256, metadata={"help": "Tokens in a row."})
    batch_size: int = field(default=8, metadata={"help": "Training rows in an update."})
    validation_rows: int = field(default=1, metadata={"help": "Validation rows of each target at an update."})
    targets: int = 1
    validation_interval: int = 1
    variants: list[str] = field(
        default_factory=lambda: ["plain", "ceiling", "fused", "project"],
        metadata={"help": "Any of plain, ceiling, fused, project; plain and ceiling are what the ratios are over."},
    )
    updates: int = field(default=8, metadata={"help": "Timed updates in a block (one more warms up)."})
    rounds: int = field(default=8, metadata={"help": "Blocks of each variant."})
    threads: int = 2
    memory: bool = field(default=True, metadata={"help": "Measure peak memory too, in processes of their own."})
    json: str | None = field(default=None, metadata={"help": "File for the figures."})
    only: str | None = field(default=None, metadata={"help": "Print the peak memory of one block of a variant."})


def build_model(setting: Setting) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = max(1, setting.width // 64)
    common = {"vocab_size": setting.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    if setting.family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=setting.layers, n_embd=setting.width, n_head=heads, n_positions=setting.length, **common
            )
        )
    shape = {
        "num_hidden_layers": setting.layers,
        "hidden_size": setting.width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * setting.width,
        "max_position_embeddings": setting.length,
        **common,
    }
    return {
        "pythia": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**shape)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
    }[setting.family]()


def random_rows(setting: Setting, count: int, seed: int) -> Dataset:
    ids = torch.randint(setting.vocabulary, (count, setting.length), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


class UpdateTimes(TrainerCallback):
    """Seconds from one update's end to the next one's; the first, which warms up, is left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


class CeilingTrainer(ShapleyTrainer):
    """Plain training and the validation gradient of `ShapleyTrainer`, which nobody uses."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        sample_ids = inputs.pop("_datashapley_sample_id")
        step = self.state.global_step + 1
        if self._validation.fresh(step):
            self._validation.gradients(self.model, self._capture.parameters, step)
        inputs = {**inputs}
        del sample_ids
        return Trainer.training_step(self, model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: Any) -> Any:
        return Trainer._clip_grad_norm(self, model)

    def _end_update(self) -> None:
        pass


def train_block(variant: str, setting: Setting, model: PreTrainedModel, updates: int) -> list[float]:
    """Trains `updates` + 1 updates and gives the seconds of all but the first."""
    times = UpdateTimes()
    train = random_rows(setting, setting.batch_size * (updates + 1), seed=1)
    targets = {f"t{k}": random_rows(setting, 2 * setting.validation_rows, seed=2 + k) for k in range(setting.targets)}
    with tempfile.TemporaryDirectory() as folder:
        args = ShapleyConfig(
            output_dir=folder,
            per_device_train_batch_size=setting.batch_size,
            max_steps=updates + 1,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            validation_batch_size=setting.validation_rows,
            validation_interval=setting.validation_interval,
            value_kernel=variant if variant in ("fused", "project") else "auto",
        )
        trainer: Trainer
        if variant == "plain":
            trainer = Trainer(model, args, train_dataset=train, callbacks=[times])
        else:
            kind = CeilingTrainer if variant == "ceiling" else ShapleyTrainer
            trainer = kind(model, args, train_dataset=train, validation_dataset=targets, callbacks=[times])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return times.seconds()


def peak_memory() -> float:
    """MiB: the accelerator's, or this process's resident peak (on Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: after a fork its peak starts at the parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def print_machine(setting: Setting) -> dict[str, str]:
    versions = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {setting.threads} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_datashapley": hf_datashapley.__version__,
    }
    if torch.cuda.is_available():
        versions["machine"] = torch.cuda.get_device_name()
    print(", ".join(f"{name} {value}" for name, value in versions.items()))
    return versions


def measured_memory(setting: Setting, variant: str) -> float:
    command = [sys.executable, __file__, "--only", variant, "--updates", "2"]
    for name in ("family", "layers", "width", "vocabulary", "length", "batch_size", "validation_rows", "targets",
                 "validation_interval", "threads"):  # fmt: skip
        command += [f"--{name}", str(vars(setting)[name])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    (setting,) = HfArgumentParser(Setting).parse_args_into_dataclasses()
    torch.set_num_threads(setting.threads)
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    model = build_model(setting)
    if setting.only:
        if setting.only != "model":
            train_block(setting.only, setting, model, setting.updates)
        print(peak_memory())
        return

    versions = print_machine(setting)
    print(
        f"{setting.family} {setting.layers}x{setting.width}, vocabulary {setting.vocabulary}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters; {setting.batch_size} + "
        f"{setting.targets} x {setting.validation_rows} rows of {setting.length} tokens, a fresh validation gradient "
        f"every {setting.validation_interval} updates; AdamW, clipping; {setting.rounds} x {setting.updates} updates"
    )
    seconds: dict[str, list[float]] = {variant: [] for variant in setting.variants}
    for done in range(setting.rounds):
        # In turn forwards and backwards, so that no variant always follows the same other one.
        for variant in setting.variants if done % 2 == 0 else reversed(setting.variants):
            seconds[variant] += train_block(variant, setting, model, setting.updates)
        print(f"  round {done + 1} of {setting.rounds}", file=sys.stderr)

    # With an interval, an update costs differently according to its place in it: the mean is over whole intervals.
    typical = statistics.median if setting.validation_interval == 1 else statistics.mean
    memory: dict[str, float] = {}
    if setting.memory:
        memory = {variant: measured_memory(setting, variant) for variant in ["model", *setting.variants]}
    rows = []
    print("variant     ms/update      IQR  of plain  of ceiling  peak MiB  over plain")
    for variant, times in seconds.items():
        low, _, high = statistics.quantiles(times, n=4)
        row = {
            "variant": variant,
            "milliseconds": 1e3 * typical(times),
            "interquartile_range": 1e3 * (high - low),
            "of_plain": typical(seconds["plain"]) / typical(times) if "plain" in seconds else None,
            "of_ceiling": typical(seconds["ceiling"]) / typical(times) if "ceiling" in seconds else None,
            "peak_mib": memory.get(variant),
            "peak_over_plain_mib": memory[variant] - memory["plain"] if "plain" in memory else None,
        }
        rows.append(row)
        cells = [f"{row['milliseconds']:10.1f}", f"{row['interquartile_range']:8.1f}"]
        cells += ["-".rjust(w) if v is None else f"{v:{w}.{d}f}" for v, w, d in (
            (row["of_plain"], 9, 3), (row["of_ceiling"], 11, 3), (row["peak_mib"], 9, 0),
            (row["peak_over_plain_mib"], 11, 0))]  # fmt: skip
        print(f"{variant:10} " + " ".join(cells))
    if setting.json:
        Path(setting.json).write_text(json.dumps({"setting": asdict(setting), **versions, "variants": rows}, indent=2))


if __name__ == "__main__":
    main()
