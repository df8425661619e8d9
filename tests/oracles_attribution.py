"""Scores of trained models by the definition: a unit's whole gradient by a backward pass of its own, in float64.

Nothing here imports hf_datashapley. Shapes: N units, Q queries, P entries of all parameters that train.
"""

import copy

import torch
import torch.nn.functional as F
from oracles import Float64, token_losses, trainable
from torch import Tensor


def losses_of(model, row) -> Tensor:
    """Of the tokens that have a label, or of the one class."""
    labels = torch.tensor([row["labels"]])
    seen = {key: torch.tensor([row[key]]) for key in ("input_ids", "position_ids", "attention_mask") if key in row}
    logits = model(**seen, use_cache=False).logits
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    return token_losses(logits, labels)[0][labels[0, 1:] != -100]


def flat(output: Tensor, model) -> Tensor:
    parameters = list(trainable(model).values())
    if not output.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    found = torch.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([own.flatten() for own in found])


class Oracle:
    """
    Args:
        model: in float32; a copy in float64 is what is asked.
        units: for each its rows, each read by itself.
        queries: rows.
    """

    def __init__(self, model, units, queries):
        self.model = copy.deepcopy(model).double().eval()
        with Float64():
            self.units = [torch.cat([losses_of(self.model, row) for row in unit]) for unit in units]
            self.queries = [losses_of(self.model, row) for row in queries]
        self.g_NP = torch.stack([flat(losses.sum(), self.model) for losses in self.units])
        self.g_QP = torch.stack([flat(losses.mean(), self.model) for losses in self.queries])

    def token_gradients(self) -> Tensor:
        return torch.stack([flat(loss, self.model) for losses in self.units for loss in losses])

    def dot(self, g_NP=None):
        return (self.g_NP if g_NP is None else g_NP) @ self.g_QP.T

    def cos(self):
        return F.normalize(self.g_NP) @ F.normalize(self.g_QP).T

    def influence(self, damping):
        return self.g_NP @ solved(self.g_NP, self.g_QP, damping)

    def trak(self, damping, output):
        """Scores without Q, and Q."""
        phi_NP, phi_QP, q_N = [], [], []
        for losses in self.units:
            phi_NP.append(
                flat(log_odds(losses, output), self.model) if len(losses) else torch.zeros_like(self.g_NP[0])
            )
            p = torch.exp(-losses.mean() if output == "mean" else -losses)
            q_N.append((1 - p) * len(losses) if output == "mean" else (1 - p).mean())
        for losses in self.queries:
            own = flat(log_odds(losses, output), self.model)
            phi_QP.append(own if output == "mean" else own / len(losses))
        phi_NP = torch.stack(phi_NP)
        q_N = torch.stack([torch.nan_to_num(q) for q in q_N]).detach()
        return phi_NP @ solved(phi_NP, torch.stack(phi_QP), damping), q_N


def log_odds(losses, output):
    p = torch.exp(-losses.mean() if output == "mean" else -losses)
    return torch.log(p / (1 - p)).sum()


def solved(g_NP, g_QP, damping):
    """(sum g g^T + damping * its mean eigenvalue that is not 0 for want of units)^-1 g_q, [P, Q]."""
    _, singular, v_NP = torch.linalg.svd(g_NP, full_matrices=False)
    damped = damping * singular.square().mean()
    inside = v_NP @ g_QP.T
    outside = g_QP.T - v_NP.T @ inside
    return v_NP.T @ (inside / (singular.square() + damped).unsqueeze(1)) + outside / damped
