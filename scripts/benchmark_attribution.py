"""What attributing costs after training, beside the libraries that others would use: rows per CPU second, one thread.

    python scripts/benchmark_attribution.py --rounds 5 --peers bergson dattri-llm traker loop

A random GPT-2 of four layers, 200 rows of 64 random tokens, 16 queries. All runs take turns in one process, forwards
and backwards, after a round that is not counted; each does whatever its library does between the rows' token ids and
features on disk or scores. The clock is the process's CPU time, which a busy machine stretches less than a wall
clock's, but does stretch: only ratios within one run of this script are to be quoted. A figure is the median over
rounds, at that of `--batch_sizes` which is best for the run.

Beside it stands how near the run comes to autograd, row by row: of exact scores the relative error; of features the
rank correlation (Spearman) of their inner products. "blocks" are the weights of the linear layers in the blocks, all
that bergson attributes; "all" is every parameter. A peer is held to the parameters that it takes.

The peers, in an environment of their own, where this project is found by `PYTHONPATH`:

    python -m venv .venv-peers
    .venv-peers/bin/pip install -c scripts/constraints.txt torch==2.13.0    # CPU build: --index-url of PyTorch's
    .venv-peers/bin/pip install -c scripts/constraints.txt bergson==2.5.1 dattri-llm==0.1.0 traker==0.3.2 \
        transformers accelerate datasets peft pandas psutil pyarrow safetensors
    .venv-peers/bin/pip uninstall -y torchvision torchaudio
    PYTHONPATH=. .venv-peers/bin/python scripts/benchmark_attribution.py

bergson asks for torchvision and torchaudio and uses neither. Where what pip finds of them does not fit the torch
(a CPU torch and a CUDA torchvision), importing any model from transformers fails with "operator torchvision::nms does
not exist"; hence the last install line. dattri-llm is imported as `dattri_llm`, traker as `trak`; traker has no output
function for language models, so one stands below.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import hf_datashapley
from hf_datashapley import GradDot, Trak
from hf_datashapley.attribution.projection import ProjectionKind
from hf_datashapley.loss_tokens import IGNORED


VOCABULARY, LENGTH = 2048, 64
BLOCKS = ["c_attn", "c_proj", "c_fc"]  # the linear layers in GPT-2's blocks, by the ends of their names
FEATURES = 4096  # bergson's 16 x 16 for each of 16 layers
CHECKED = 48  # rows that are held against autograd


@dataclass
class Problem:
    model: PreTrainedModel
    rows_RT: Tensor
    queries_KT: Tensor
    trak_features: int


# Token ids to features [rows, F] or scores [rows, queries], by rows of a batch.
Method = Callable[[Problem, int], Tensor]


@dataclass
class Run:
    """`scope`: "all" or "blocks"; `exact`: gives scores, not features."""

    name: str
    package: str
    scope: str
    exact: bool
    method: Method


def build_problem(rows: int, queries: int, trak_features: int) -> Problem:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=128, n_head=4, n_positions=LENGTH, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    ids_RT, ids_KT = (torch.randint(VOCABULARY, (count, LENGTH)) for count in (rows, queries))
    return Problem(model, ids_RT, ids_KT, trak_features)


def token_loss(model: torch.nn.Module, ids_RT: Tensor) -> Tensor:
    """Summed over all tokens of all rows. Labels are shifted, not logits, of which that would be a copy."""
    labels_RT = F.pad(ids_RT[:, 1:], (0, 1), value=IGNORED)
    logits_RTV = model(input_ids=ids_RT, use_cache=False).logits
    return F.cross_entropy(logits_RTV.flatten(0, 1), labels_RT.flatten(), reduction="sum", ignore_index=IGNORED)


def row_gradient(model: torch.nn.Module, ids_T: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(token_loss(model, ids_T[None]), list(model.parameters())))


# ---------------------------------------------------------------------------------------------------------------------
# Peers


def loop(problem: Problem, batch_size: int) -> Tensor:
    """Single rows by autograd, against the queries' gradients; a batch is always one row."""
    queries_KN = torch.stack([flat(row_gradient(problem.model, ids_T)) for ids_T in problem.queries_KT])
    return torch.stack([queries_KN @ flat(row_gradient(problem.model, ids_T)) for ids_T in problem.rows_RT])


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def bergson(problem: Problem, batch_size: int, projection_dim: int) -> Tensor:
    """Features on disk, read back. Weights are frozen up to the embedding, or their gradients would be formed too."""
    from bergson import GradientProcessor, IndexConfig, collect_gradients, load_gradients

    model = copy.deepcopy(problem.model).requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    rows = len(problem.rows_RT)
    data = Dataset.from_dict({"input_ids": problem.rows_RT.tolist(), "length": [LENGTH] * rows})
    batches = [list(range(start, min(start + batch_size, rows))) for start in range(0, rows, batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(run_path=os.path.join(folder, "run"), projection_dim=projection_dim)
        Path(config.partial_run_path).mkdir()
        processor = GradientProcessor(projection_dim=projection_dim)
        collect_gradients(model, data, processor, config, batches=batches)
        return torch.from_numpy(np.array(load_gradients(config.partial_run_path)[:CHECKED]))


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """As dattri-llm's loader takes them."""

    def __init__(self, ids_RT: Tensor):
        self.ids_RT = ids_RT

    def __len__(self) -> int:
        return len(self.ids_RT)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids_RT[i]}


def dattri_llm(problem: Problem, batch_size: int, layers: list[str] | None) -> Tensor:
    """TracIn live: gradients of rows and queries, and their products, which come back by the rows' hashes."""
    from dattri_llm import (
        REGISTER_ALL,
        AttributionArguments,
        AttributionTask,
        HookManagerConfig,
        TracInAttributor,
        hash_sample,
    )

    task = AttributionTask(lambda model, batch: token_loss(model, batch["input_ids"]), copy.deepcopy(problem.model))
    hooks = HookManagerConfig(linear_io=REGISTER_ALL if layers is None else [f"{layer}$" for layer in layers])
    with tempfile.TemporaryDirectory() as folder:
        args = AttributionArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=len(problem.queries_KT),
            use_cpu=True,
        )
        score = TracInAttributor(args, task=task).attribute(
            Examples(problem.rows_RT), Examples(problem.queries_KT), hook_config=hooks
        )
    row_hashes, scores_RK = score.agnostic_matrix()
    place = {row_hash: i for i, row_hash in enumerate(row_hashes)}
    return scores_RK[[place[hash_sample({"input_ids": ids_T})] for ids_T in problem.rows_RT]]


class MeanLossMargin:
    """TRAK's output of a row for traker, f = log(p / (1 - p)) with p = exp(-mean loss), and dloss/df = p - 1."""

    @staticmethod
    def get_output(model: torch.nn.Module, weights: Any, buffers: Any, ids_T: Tensor) -> Tensor:
        logits_TV = torch.func.functional_call(model, (weights, buffers), (ids_T[None],)).logits[0, :-1]
        return margin(F.cross_entropy(logits_TV, ids_T[1:]))

    @staticmethod
    def get_out_to_loss_grad(model: torch.nn.Module, weights: Any, buffers: Any, batch: tuple[Tensor]) -> Tensor:
        (ids_RT,) = batch
        with torch.no_grad():
            logits_RTV = torch.func.functional_call(model, (weights, buffers), (ids_RT,)).logits[:, :-1]
            losses_RT = F.cross_entropy(logits_RTV.transpose(1, 2), ids_RT[:, 1:], reduction="none")
        return torch.exp(-losses_RT.mean(1, keepdim=True)) - 1


def margin(mean_loss: Tensor) -> Tensor:
    return -mean_loss - torch.log(-torch.expm1(-mean_loss))


def traker(problem: Problem, batch_size: int) -> Tensor:
    """Features and scores with the projector that needs only torch, in float32; the features."""
    from trak import TRAKer

    model = copy.deepcopy(problem.model)
    model.config.use_cache = False
    weights = model.state_dict()
    rows, queries = problem.rows_RT, problem.queries_KT
    with tempfile.TemporaryDirectory() as folder:
        trak = TRAKer(
            model=model,
            task=MeanLossMargin(),
            train_set_size=len(rows),
            save_dir=folder,
            device="cpu",
            proj_dim=problem.trak_features,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        trak.load_checkpoint(weights, model_id=0)
        for ids_RT in rows.split(batch_size):
            trak.featurize(batch=(ids_RT,), num_samples=len(ids_RT))
        features_RF = torch.from_numpy(np.array(trak.saver.current_store["grads"]))
        trak.finalize_features()
        trak.start_scoring_checkpoint("queries", weights, model_id=0, num_targets=len(queries))
        for ids_RT in queries.split(batch_size):
            trak.score(batch=(ids_RT,), num_samples=len(ids_RT))
        trak.finalize_scores("queries")
    return features_RF


PEERS = [
    Run("loop of single rows", "loop", "all", True, loop),
    Run("bergson, whole gradients to disk", "bergson", "blocks", False, lambda p, b: bergson(p, b, 0)),
    Run("bergson, 16 x 16 to disk", "bergson", "blocks", False, lambda p, b: bergson(p, b, 16)),
    Run("dattri-llm, TracIn", "dattri-llm", "all", True, lambda p, b: dattri_llm(p, b, None)),
    Run("dattri-llm, TracIn", "dattri-llm", "blocks", True, lambda p, b: dattri_llm(p, b, BLOCKS)),
    Run("traker, TRAK", "traker", "all", False, traker),
]
MODULES = {"bergson": "bergson", "dattri-llm": "dattri_llm", "traker": "trak"}

# ---------------------------------------------------------------------------------------------------------------------
# Ours


def rows_of(ids_RT: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_RT]


def exact_scores(problem: Problem, batch_size: int, modules: list[str] | None) -> Tensor:
    """Ours are of queries' mean losses."""
    estimator = GradDot(problem.model, modules=modules, batch_size=batch_size, progress=False)
    scores = estimator.fit(rows_of(problem.rows_RT)).score(rows_of(problem.queries_KT))
    return torch.from_numpy(scores) * (LENGTH - 1)


def features_to_disk(problem: Problem, batch_size: int, modules: list[str] | None) -> Tensor:
    estimator = GradDot(
        problem.model,
        modules=modules,
        projection_dim=FEATURES,
        projection="logra",
        batch_size=batch_size,
        progress=False,
    ).fit(rows_of(problem.rows_RT))
    return torch.cat([features_uF for _, features_uF in estimator.features()])


def trak(problem: Problem, batch_size: int, projection: ProjectionKind) -> Tensor:
    """Features and scores; the features."""
    estimator = Trak(
        problem.model,
        projection_dim=problem.trak_features,
        projection=projection,
        batch_size=batch_size,
        progress=False,
    ).fit(rows_of(problem.rows_RT))
    estimator.score(rows_of(problem.queries_KT))
    return torch.cat([features_uF for _, features_uF in estimator.features()])


OURS = [
    Run("hf_datashapley, GradDot", "", "all", True, lambda p, b: exact_scores(p, b, None)),
    Run("hf_datashapley, GradDot", "", "blocks", True, lambda p, b: exact_scores(p, b, BLOCKS)),
    Run(f"hf_datashapley, {FEATURES} features to disk", "", "all", False, lambda p, b: features_to_disk(p, b, None)),
    Run(
        f"hf_datashapley, {FEATURES} features to disk",
        "",
        "blocks",
        False,
        lambda p, b: features_to_disk(p, b, BLOCKS),
    ),
    Run("hf_datashapley, TRAK, sjlt", "", "all", False, lambda p, b: trak(p, b, "sjlt")),
    Run("hf_datashapley, TRAK, logra", "", "all", False, lambda p, b: trak(p, b, "logra")),
]

# ---------------------------------------------------------------------------------------------------------------------


def agreement(run: Run, found: Tensor, problem: Problem) -> str:
    """With autograd, in float64 sums: relative error of scores, rank correlation of features' inner products."""
    ends = tuple(f"{layer}.weight" for layer in BLOCKS)
    names = [name for name, _ in problem.model.named_parameters()]

    def gradients(ids_RT: Tensor, all_of: bool) -> Tensor:
        return torch.stack(
            [
                flat(
                    [g for n, g in zip(names, row_gradient(problem.model, ids_T), strict=True) if all_of or chosen(n)]
                )
                for ids_T in ids_RT
            ]
        ).double()

    def chosen(name: str) -> bool:
        # Our blocks and dattri-llm's have the layers' biases, bergson's have not.
        return name.endswith(ends) or (run.package != "bergson" and name.endswith(tuple(f"{x}.bias" for x in BLOCKS)))

    rows_RN = gradients(problem.rows_RT[:CHECKED], run.scope == "all")
    found = found[:CHECKED].double()
    if run.exact:
        true_RK = rows_RN @ gradients(problem.queries_KT, run.scope == "all").T
        return f"error {((found - true_RK).norm() / true_RK.norm()).item():.1e}"
    above = torch.triu_indices(CHECKED, CHECKED, offset=1)
    pairs = torch.stack([(found @ found.T)[above[0], above[1]], (rows_RN @ rows_RN.T)[above[0], above[1]]])
    if found.shape[1] == rows_RN.shape[1]:
        return f"error {((pairs[0] - pairs[1]).norm() / pairs[1].norm()).item():.1e}"
    ranks = pairs.argsort(dim=1).argsort(dim=1).double()
    return f"Spearman {torch.corrcoef(ranks)[0, 1].item():.2f}"


def quiet(run: Run, problem: Problem, batch_size: int) -> Tensor:
    """What it finds, without its progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        return run.method(problem, batch_size)


def cpu_seconds(run: Run, problem: Problem, batch_size: int) -> float:
    start = time.process_time()
    quiet(run, problem, batch_size)
    return time.process_time() - start


def measured(runs: list[Run], problem: Problem, batch_sizes: list[int], rounds: int) -> list[tuple[int, float]]:
    """The best batch size of each run, and its rows per CPU second."""
    seconds: dict[tuple[int, int], list[float]] = {}
    cases = [(i, size) for i, run in enumerate(runs) for size in (batch_sizes if run.method is not loop else [1])]
    for number in range(rounds + 1):
        for i, size in cases if number % 2 == 0 else reversed(cases):
            seconds.setdefault((i, size), []).append(cpu_seconds(runs[i], problem, size))
    medians = {case: statistics.median(times[1:]) for case, times in seconds.items()}
    best = [min((size for j, size in cases if j == i), key=lambda size: medians[i, size]) for i in range(len(runs))]
    return [(size, len(problem.rows_RT) / medians[i, size]) for i, size in enumerate(best)]


def installed(peers: list[str]) -> list[Run]:
    runs = []
    for peer in peers:
        module = MODULES.get(peer)
        if module is not None and importlib.util.find_spec(module) is None:
            print(f"{peer} is not installed, and left out")
            continue
        runs += [run for run in PEERS if run.package == peer]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(run.package for run in PEERS))
    parser.add_argument("--peers", nargs="*", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--trak_features", type=int, default=128, help="traker's own default is 2048")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16, 32])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.INFO)
    disable_progress_bar()

    runs = installed(args.peers) + OURS
    problem = build_problem(args.rows, args.queries, args.trak_features)
    packages = ["torch", "transformers", *dict.fromkeys(run.package for run in runs if run.package in MODULES)]
    print(
        f"{platform.processor() or platform.machine()}, one thread of {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}, "
        f"hf_datashapley {hf_datashapley.__version__}; GPT-2 4x128, "
        f"{sum(p.numel() for p in problem.model.parameters()) / 1e6:.2f}M parameters; {args.rows} rows of {LENGTH} "
        f"tokens, {args.queries} queries, {args.trak_features} features for TRAK; median of {args.rounds} rounds\n"
    )
    agreements = [agreement(run, quiet(run, problem, args.batch_sizes[0]), problem) for run in runs]
    found = measured(runs, problem, args.batch_sizes, args.rounds)
    print("| run | parameters | rows per CPU second | batch | against autograd |")
    print("|---|---|---|---|---|")
    for run, (size, speed), agrees in zip(runs, found, agreements, strict=True):
        print(f"| {run.name} | {run.scope} | {speed:.1f} | {size} | {agrees} |")


if __name__ == "__main__":
    main()
