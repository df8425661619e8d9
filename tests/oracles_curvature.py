"""Influence under block curvatures, slow and obvious: one row at a time, in float64, every block of H a whole matrix.

    score_iq = sum over parameters of  g_q^T (H + d)^-1 g_i / N       d = damping * trace(H) / size

Nothing here imports hf_datashapley, but for the numbers by which labels are drawn, which come as an argument.
Shapes: P positions, L and R the sides of a weight's gradient, V classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oracles import Float64
from torch import nn
from transformers.pytorch_utils import Conv1D


IGNORED = -100
Gradient = dict[str, np.ndarray]
# (row, number of its loss tokens) -> numbers between 0 and 1
Uniforms = Callable[[Any, int], np.ndarray]
Collate = Callable[[Sequence[Any]], dict[str, torch.Tensor]]


@dataclass
class Fisher:
    """Sums over rows of what labels drawn from the model's predictions give.

    `sides`: of each weight, a list of (l_p, r_p) for every use and position that the loss may depend on.
    """

    tokens: int = 0
    gradients: list[Gradient] = field(default_factory=list)
    sides: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)


def targets(batch: dict[str, torch.Tensor], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions [N, V] and given labels [N] of one row."""
    labels = batch["labels"][0]
    if labels.ndim == 0:
        return logits, batch["labels"]
    wanted = labels[1:] != IGNORED
    return logits[0, :-1][wanted], labels[1:][wanted]


def predictions(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return targets(batch, logits)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradient(loss: torch.Tensor, model: nn.Module) -> Gradient:
    own = trained(model)
    found = torch.autograd.grad(loss, list(own.values()), retain_graph=True, materialize_grads=True)
    return {name: g.numpy() for name, g in zip(own, found, strict=True)}


def summed_gradients(model: nn.Module, rows: Sequence[Any], collate: Collate) -> tuple[list[Gradient], list[int]]:
    """Of each row's summed token losses with the labels that it has, and its number of tokens."""
    gradients, counts = [], []
    for row in rows:
        with Float64():
            logits, labels = predictions(model, collate([row]))
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradients.append(gradient(loss, model))
        counts.append(len(labels))
    return gradients, counts


def fisher(model: nn.Module, rows: Sequence[Any], collate: Collate, uniforms: Uniforms) -> Fisher:
    names: dict[Any, str] = {p: name for name, p in trained(model).items()}
    total = Fisher()
    for row in rows:
        seen: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

        def hook(module: nn.Module, args: Any, output: torch.Tensor, seen: list[Any] = seen) -> None:
            seen.append((module, args[0].detach(), output))

        layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D | nn.Embedding)]
        layers = [m for m in layers if m.weight in names]
        handles = [m.register_forward_hook(hook) for m in layers]
        with Float64():
            logits, _ = predictions(model, collate([row]))
        for handle in handles:
            handle.remove()
        below = np.cumsum(torch.softmax(logits, 1).detach().numpy(), axis=1)
        drawn = uniforms(row, len(logits))
        labels = torch.tensor([int(np.searchsorted(c, u, side="right")) for c, u in zip(below, drawn, strict=True)])
        total.tokens += len(logits)
        if not len(logits):
            continue
        with Float64():
            loss = F.cross_entropy(logits, labels, reduction="sum")
        total.gradients.append(gradient(loss, model))
        given = collate([row])["labels"][0]
        # The last label is predicted one position before it stands.
        last = None if given.ndim == 0 else int((given != IGNORED).nonzero().max())
        passed = torch.autograd.grad(loss, [output for _, _, output in seen], materialize_grads=True)
        for (module, x, _), b in zip(seen, passed, strict=True):
            if isinstance(module, nn.Embedding):
                x = F.one_hot(x, module.num_embeddings).double()
            left, right = (x, b) if isinstance(module, Conv1D | nn.Embedding) else (b, x)
            own = total.sides.setdefault(names[module.weight], [])
            own += zip(left[0, :last].numpy(), right[0, :last].numpy(), strict=True)
    return total


def tables(model: nn.Module) -> set[str]:
    names: dict[Any, str] = {p: name for name, p in trained(model).items()}
    return {names[m.weight] for m in model.modules() if isinstance(m, nn.Embedding) and m.weight in names}


def factors(name: str, total: Fisher, table: bool) -> tuple[np.ndarray, np.ndarray, int]:
    lefts, rights = (np.array(side) for side in zip(*total.sides[name], strict=True))
    left = lefts.T @ lefts
    return np.diag(np.diag(left)) if table else left, rights.T @ rights, len(lefts)


def outer_products(name: str, total: Fisher) -> np.ndarray:
    flat = np.array([g[name].ravel() for g in total.gradients])
    return flat.T @ flat / total.tokens


def kfac(name: str, total: Fisher, table: bool) -> np.ndarray:
    """A block of H; of a vector the exact one."""
    if name not in total.sides:
        return outer_products(name, total)
    left, right, positions = factors(name, total, table)
    return np.kron(left, right) / (positions * total.tokens)


def ekfac(name: str, total: Fisher, table: bool) -> np.ndarray:
    if name not in total.sides:
        return outer_products(name, total)
    left, right, _ = factors(name, total, table)
    left_basis = np.eye(len(left)) if table else np.linalg.eigh(left)[1]
    right_basis = np.linalg.eigh(right)[1]
    squares = sum((left_basis.T @ g[name] @ right_basis) ** 2 for g in total.gradients)
    basis = np.kron(left_basis, right_basis)
    return basis @ np.diag(squares.ravel() / total.tokens) @ basis.T


def scores(
    blocks: dict[str, np.ndarray],
    units: Sequence[Gradient],
    queries: Sequence[Gradient],
    query_tokens: Sequence[int],
    tokens: int,
    damping: float,
) -> np.ndarray:
    """[units, queries]."""
    total = np.zeros((len(units), len(queries)))
    for name, block in blocks.items():
        size = len(block)
        damped = block + damping * np.trace(block) / size * np.eye(size)
        unit = np.array([g[name].ravel() for g in units])
        query = np.array([g[name].ravel() / n for g, n in zip(queries, query_tokens, strict=True)])
        total += unit @ np.linalg.solve(damped, query.T) / tokens
    return total


def datainf(
    units: Sequence[Gradient],
    queries: Sequence[Gradient],
    query_tokens: Sequence[int],
    tokens: int,
    damping: float,
) -> np.ndarray:
    """The mean over units of the inverses of their own damped matrices, parameter by parameter."""
    total = np.zeros((len(units), len(queries)))
    for name in units[0]:
        unit = np.array([g[name].ravel() for g in units])
        query = np.array([g[name].ravel() / n for g, n in zip(queries, query_tokens, strict=True)])
        scaled = unit * np.sqrt(len(unit) / tokens)
        level = damping * np.mean(scaled**2)
        inverse = np.mean([np.linalg.inv(np.outer(h, h) + level * np.eye(len(h))) for h in scaled], axis=0)
        total += unit @ inverse @ query.T / tokens
    return total
