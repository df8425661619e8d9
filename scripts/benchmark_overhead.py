"""What values cost: plain `Trainer`, the ceiling, and `ShapleyTrainer`, alternating in one process.

The ceiling is plain training and the same validation pass, nothing scored: no exact method can be faster. Each
variant is a real training run; the runs take turns update by update (in greenlets, so that all share one thread and
one heap), and whatever else the machine does hits all of them alike. A round is one update of each, or one whole
validation interval. Ratios are taken within a round; medians and quartiles are over rounds. Only ratios within one
run of this script are to be quoted. Peak memory is that of a few updates in a process of its own, over a process that
has imported everything and built the model.

    python scripts/benchmark_overhead.py                       # GPT-2 4x256, 8 + 1 rows of 256 tokens
    python scripts/benchmark_overhead.py --batch_size 16
    python scripts/benchmark_overhead.py --targets 8 --variants plain ceiling fused
    python scripts/benchmark_overhead.py --validation_interval 10 --rounds 8 --variants plain ceiling fused
    python scripts/benchmark_overhead.py --variants plain second path path-3 owen owen-3
    python scripts/benchmark_overhead.py --document_length 200 --variants plain ceiling fused documents tokens
    python scripts/benchmark_overhead.py --variants plain plain-compiled ceiling-compiled fused-compiled fused
    python scripts/benchmark_overhead.py --variants plain fused features      # 4,096 features of each sample
    python scripts/benchmark_overhead.py --processes 2 --threads 1 --variants plain ceiling fused    # DDP

"x-compiled" is variant x with `torch_compile=True`. Ratios are taken over whichever of plain, plain-compiled, ceiling
and ceiling-compiled are among the variants, and over fused if documents or tokens are. Compiling is part of the first
update, which is not counted; its memory is.

With `--document_length` rows are packed from documents one after the other, cut where a row is full. All variants
train on the same rows, with the attention mask that keeps documents apart; fused then values whole rows.
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
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from greenlet import getcurrent, greenlet
from tqdm.auto import tqdm
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
from hf_datashapley.loss_tokens import IGNORED
from hf_datashapley.trainer.compiled import compiled_apart


# What ShapleyTrainer is set to.
VALUED: dict[str, dict[str, Any]] = {
    "fused": {},
    "project": {"value_kernel": "project"},
    "features": {"feature_dim": 4096},
    "second": {"value_order": "second"},
    "path": {"value_order": "path"},
    "path-3": {"value_order": "path", "path_nodes": 3},
    "replay": {"value_order": "path", "second_pass": "replay"},
    "owen": {"value_order": "path", "path_slope": "owen"},
    "owen-3": {"value_order": "path", "path_slope": "owen", "path_nodes": 3},
    "documents": {"value_unit": "document"},
    "tokens": {"value_unit": "token"},
}
COMPILED = "-compiled"
BASES = ("plain", f"plain{COMPILED}", "ceiling", f"ceiling{COMPILED}")
PARTS = {"documents", "tokens"}  # of rows; what they cost over values of whole rows


@dataclass
class Setting:
    """What is measured."""

    family: str = field(default="gpt2", metadata={"help": "gpt2, pythia or llama."})
    layers: int = 4
    width: int = 256
    vocabulary: int = 8192
    length: int = field(default=256, metadata={"help": "Tokens in a row."})
    document_length: int = field(
        default=0, metadata={"help": "Tokens of the documents that rows are packed from; 0: a row is not divided."}
    )
    batch_size: int = field(default=8, metadata={"help": "Training rows of a process in an update."})
    validation_rows: int = field(default=1, metadata={"help": "Validation rows of each target at an update."})
    targets: int = 1
    validation_interval: int = 1
    variants: list[str] = field(
        default_factory=lambda: ["plain", "ceiling", "fused", "project"],
        metadata={
            "help": f"Any of plain, ceiling (which the ratios are over), {', '.join(VALUED)}, each also with "
            f"'{COMPILED}' after it."
        },
    )
    rounds: int = field(default=40, metadata={"help": "Updates of each variant, or whole validation intervals."})
    processes: int = field(default=1, metadata={"help": "That train together (DDP); the first one's clock counts."})
    threads: int = field(default=2, metadata={"help": "Of each process."})
    memory: bool = field(default=True, metadata={"help": "Measure peak memory too, in processes of their own."})
    json: str | None = field(default=None, metadata={"help": "File for the figures."})
    folder: str | None = field(default=None, metadata={"help": "Given to the processes that this script starts."})
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
    """R rows of T tokens; of documents as `pack_documents` makes them."""
    shape = count, setting.length
    ids_RT = torch.randint(setting.vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    if not setting.document_length:
        return Dataset.from_dict({"input_ids": ids_RT.tolist(), "labels": ids_RT.tolist()})
    token_RT = torch.arange(ids_RT.numel()).view(shape)
    # A document that goes on in another row begins again there.
    position_RT = torch.minimum(token_RT % setting.document_length, torch.arange(setting.length))
    columns = {
        "input_ids": ids_RT,
        "labels": ids_RT.masked_fill(position_RT == 0, IGNORED),
        "position_ids": position_RT,
        "document_id": token_RT // setting.document_length,
    }
    return Dataset.from_dict({name: column_RT.tolist() for name, column_RT in columns.items()})


class Baton(TrainerCallback):
    """Gives the thread back to whoever started this run, at the end of every update."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        parent = getcurrent().parent
        assert parent is not None
        parent.switch()


class CeilingTrainer(ShapleyTrainer):
    """Plain training and the validation gradient of `ShapleyTrainer`, which nobody uses."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        del inputs["_datashapley_sample_id"]
        step = self.state.global_step + 1
        if self._validation.fresh(step):
            self._validation.gradients(self._validated, self._capture.parameters, step)
        return Trainer.training_step(self, model, inputs, num_items_in_batch)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer._inner_training_loop(self, *args, **kwargs)  # nothing is attached

    def _clip_grad_norm(self, model: Any) -> Any:
        return Trainer._clip_grad_norm(self, model)

    def _begin_run(self) -> None:
        self._validated = compiled_apart(self.model, self.accelerator)

    def _end_update(self) -> None:
        pass


def train(variant: str, setting: Setting, model: PreTrainedModel, updates: int) -> None:
    rows = random_rows(setting, setting.processes * setting.batch_size * updates, seed=1)
    kind = variant.removesuffix(COMPILED)
    targets = {f"t{k}": random_rows(setting, 2 * setting.validation_rows, seed=2 + k) for k in range(setting.targets)}
    # All processes write to the one folder that they were given.
    shared = None if setting.folder is None else os.path.join(setting.folder, variant)
    with tempfile.TemporaryDirectory() if shared is None else nullcontext(shared) as folder:
        args = ShapleyConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=setting.batch_size,
            max_steps=updates,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            validation_batch_size=setting.validation_rows,
            validation_interval=setting.validation_interval,
            torch_compile=variant.endswith(COMPILED),
            **VALUED.get(kind, {}),
        )
        trainer: Trainer
        if kind == "plain":
            trainer = Trainer(model, args, train_dataset=rows, callbacks=[Baton()])
        else:
            valued = CeilingTrainer if kind == "ceiling" else ShapleyTrainer
            trainer = valued(model, args, train_dataset=rows, validation_dataset=targets, callbacks=[Baton()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class Run:
    """A training run that makes one update at a time."""

    def __init__(self, variant: str, setting: Setting, updates: int):
        self._greenlet = greenlet(lambda: train(variant, setting, build_model(setting), updates))

    def update(self) -> float:
        """Goes on to the end of the next update; its seconds."""
        start = time.perf_counter()
        self._greenlet.switch()
        return time.perf_counter() - start

    def finish(self) -> None:
        while not self._greenlet.dead:
            self._greenlet.switch()


def measured_seconds(setting: Setting) -> dict[str, list[float]]:
    """Seconds of each variant's rounds, after a first one that warms up."""
    length = setting.validation_interval
    runs = {variant: Run(variant, setting, (setting.rounds + 1) * length) for variant in setting.variants}
    seconds: dict[str, list[float]] = {variant: [0.0] * (setting.rounds + 1) for variant in setting.variants}
    for number in tqdm(range((setting.rounds + 1) * length), "updates of each", disable=not is_first()):
        # In turn forwards and backwards, so that no variant always follows the same other one.
        for variant in setting.variants if number % 2 == 0 else reversed(setting.variants):
            seconds[variant][number // length] += runs[variant].update()
    for run in runs.values():
        run.finish()
    return {variant: rounds[1:] for variant, rounds in seconds.items()}


def ratio(of: list[float], over: list[float]) -> dict[str, float]:
    """Throughput over that of another variant: median and quartiles of the ratios within rounds."""
    low, median, high = statistics.quantiles([b / a for a, b in zip(of, over, strict=True)], n=4)
    return {"median": median, "low": low, "high": high}


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
    command = [sys.executable, __file__, "--only", variant]
    for name in ("family", "layers", "width", "vocabulary", "length", "document_length", "batch_size",
                 "validation_rows", "targets", "validation_interval", "threads"):  # fmt: skip
        command += [f"--{name}", str(vars(setting)[name])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def start_processes(setting: Setting) -> None:
    """This script again, in each of them; their peaks are not measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={setting.processes}", __file__, *sys.argv[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
        subprocess.run([*command, "--folder", folder, "--memory", "false"], check=True, env=environment)


def main() -> None:
    (setting,) = HfArgumentParser(Setting).parse_args_into_dataclasses()
    if setting.rounds < 2:
        raise SystemExit(f"--rounds {setting.rounds}: quartiles take at least 2")
    if setting.processes > 1 and setting.folder is None:
        start_processes(setting)
        return
    torch.set_num_threads(setting.threads)
    # The variants share the model's code, and so what is counted against its limit.
    torch._dynamo.config.recompile_limit = 64
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    if setting.only:
        if setting.only == "model":
            build_model(setting)
        else:
            Run(setting.only, setting, updates=3).finish()
        print(peak_memory())
        return

    if not is_first():
        measured_seconds(setting)
        return
    versions = print_machine(setting)
    documents = f" packed from documents of {setting.document_length}" if setting.document_length else ""
    print(
        f"{setting.family} {setting.layers}x{setting.width}, vocabulary {setting.vocabulary}, "
        f"{sum(p.numel() for p in build_model(setting).parameters()) / 1e6:.1f}M parameters; {setting.batch_size} + "
        f"{setting.targets} x {setting.validation_rows} rows of {setting.length} tokens{documents}; a fresh "
        f"validation gradient every {setting.validation_interval} updates; AdamW, clipping; {setting.processes} "
        f"processes; {setting.rounds} rounds"
    )
    seconds = measured_seconds(setting)
    memory: dict[str, float] = {}
    if setting.memory:
        memory = {variant: measured_memory(setting, variant) for variant in ["model", *setting.variants]}
    results = []
    bases = [base for base in BASES if base in seconds]
    if "fused" in seconds and PARTS & seconds.keys():
        bases.append("fused")
    columns = "  ".join(f"over {base}".center(22) for base in bases)
    print(f"{'variant':18} ms/update      IQR    {columns}   peak MiB  over plain")
    for variant, times in seconds.items():
        low, typical, high = (1e3 * t / setting.validation_interval for t in statistics.quantiles(times, n=4))
        result: dict[str, Any] = {"variant": variant, "milliseconds": typical, "interquartile_range": high - low}
        for base in bases:
            result[f"of_{base}"] = ratio(times, seconds[base])
        result["peak_mib"] = memory.get(variant)
        result["peak_over_plain_mib"] = memory[variant] - memory["plain"] if "plain" in memory else None
        results.append(result)
        ratios = [
            f"{found['median']:.3f} ({found['low']:.3f}-{found['high']:.3f})".center(22)
            for found in (result[f"of_{base}"] for base in bases)
        ]
        peaks = [
            "-" if peak is None else f"{peak:.0f}" for peak in (result["peak_mib"], result["peak_over_plain_mib"])
        ]
        print(f"{variant:18} {typical:9.1f} {high - low:8.1f}    {'  '.join(ratios)}  {peaks[0]:>9}  {peaks[1]:>10}")
    if setting.json:
        found = {"setting": asdict(setting), **versions, "variants": results}
        Path(setting.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
