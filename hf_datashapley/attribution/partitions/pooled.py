"""Of each unit one vector, from what its model makes of it: what clusters are made of.

    representation   mean over the unit's tokens of h_t
    gradient         mean over its loss tokens of d l / d h_t,   l the sum of its token losses

with h_t the input of the model's output layer (for a causal language model its last hidden state). The second is what
the paper clusters (Ley et al., arXiv 2410.09940: gradients with respect to penultimate activations), where a sample
has one activation; with one for each token it is a mean over tokens, as the representation is. (A sum, the gradient of
a bias added to all h_t, grows with the unit's length, and its clusters are then those of long and of short units.)

Costs a forward pass below the output layer; of the gradient, one with it and back through it alone. Pieces of a unit
in several rows are added up. A unit without a (loss) token is a vector of zeros.

Shapes: R rows, T positions, U units of a batch, N of a shard, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...directions.validation import evaluating
from ...full_precision import in_full
from ...ghost.units import Units
from ...loss_tokens import IGNORED, loss_positions
from ..corpus import Corpus
from ..losses import token_losses, without_cache
from ..measures import moved


# Units whose sums are held at a time.
SHARD_UNITS = 512

# A batch on the model's device and its units -> [U, D + 1]: sums, and over how many tokens.
Measure = Callable[[dict[str, Any], Units], Tensor]


def representations(model: nn.Module, body: nn.Module, corpus: Corpus) -> Iterator[Tensor]:
    """`body`: `body_of` the model."""

    def measure(inputs: dict[str, Any], units: Units) -> Tensor:
        # Not by `output_hidden_states`, which leaves hooks in the model, and makes logits.
        asked = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad(), without_cache(model):
            hidden_RTD = in_full(body(**asked)[0])
        counted_RT1 = counted(inputs, hidden_RTD, corpus.reading.unit == "document").unsqueeze(-1)
        return units.sum(torch.cat([hidden_RTD * counted_RT1, counted_RT1.to(hidden_RTD.dtype)], -1))

    return means(model, corpus, measure)


def gradients(model: nn.Module, layer: nn.Module, corpus: Corpus) -> Iterator[Tensor]:
    """`layer`: the output layer, see `layer_of`."""
    shifted = corpus.reading.shifted

    def measure(inputs: dict[str, Any], units: Units) -> Tensor:
        with frozen(model), entering(layer) as entered, without_cache(model):
            losses = token_losses(model, inputs, shifted)
            if len(entered) != 1:
                raise ValueError(
                    f"the output layer is passed {len(entered)} times in a forward pass, and its input is asked for: "
                    "name a layer that is passed once (output_layer)"
                )
            (found,) = torch.autograd.grad(losses.sum(), entered)
        labels = inputs["labels"]
        where = labels.ne(IGNORED) if labels.ndim == 1 else loss_positions(labels.clone(), shifted)
        tokens = units.sum(where.view(len(labels), -1, 1).to(losses.dtype))
        return torch.cat([units.sum(in_full(found)), tokens], -1)

    return means(model, corpus, measure)


def means(model: nn.Module, corpus: Corpus, measure: Measure) -> Iterator[Tensor]:
    """Over each unit's tokens, [N, D], shard by shard, on the CPU."""
    device = next(model.parameters()).device
    starts = range(0, corpus.count, SHARD_UNITS)
    for start in tqdm(starts, "features to cluster", disable=not corpus.reading.progress, leave=False):
        stop = min(start + SHARD_UNITS, corpus.count)
        sums: Tensor | None = None
        with evaluating(model):
            for batch in corpus.batches(start, stop):
                found = measure(moved(batch.inputs, device), batch.units).cpu()
                wanted = batch.place >= 0
                if sums is None:
                    sums = found.new_zeros(stop - start, found.shape[1])
                sums.index_add_(0, batch.place[wanted], found[wanted])
        assert sums is not None
        yield sums[:, :-1] / sums[:, -1:].clamp(min=1)


def counted(inputs: dict[str, Any], hidden_RTD: Tensor, documents: bool) -> Tensor:
    """Which positions are a unit's, bool [R, T]: by the attention mask, or all where there is none.

    Padding of packed documents has no mask, and counts as the document's beside it. By its positions it is a piece of
    its own, and like a piece of one token it has no label: such pieces are left out.
    """
    shape = hidden_RTD.shape[:2]
    if documents:
        place_RT = inputs["position_ids"] - torch.arange(shape[1], device=hidden_RTD.device)
        begins_RT = torch.ones(shape, dtype=torch.bool, device=hidden_RTD.device)
        begins_RT[:, 1:] = place_RT[:, 1:] != place_RT[:, :-1]
        piece = begins_RT.flatten().cumsum(0) - 1
        labels = torch.zeros_like(piece).index_add_(0, piece, inputs["labels"].ne(IGNORED).flatten().long())
        return labels[piece].view(shape) > 0
    if "attention_mask" in inputs:
        return inputs["attention_mask"].bool()
    return torch.ones(shape, dtype=torch.bool, device=hidden_RTD.device)


def transformers_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def body_of(model: nn.Module) -> nn.Module:
    """What makes the last hidden state.

    Raises:
        ValueError: it is not known of this model.
    """
    base = transformers_model(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"{type(base).__name__} is no model of transformers, and has no last hidden state that is known of: give "
            "one that is, or a function that makes vectors of texts (SentenceTransformer(...).encode)"
        )
    return base.base_model


def layer_of(model: nn.Module, name: str | None) -> nn.Module:
    """
    Raises:
        ValueError: the model has none of this name, or does not say which one its output layer is.
    """
    base = transformers_model(model)
    if name is not None:
        modules = dict(base.named_modules())
        if name not in modules:
            raise ValueError(f"output_layer={name!r} is no module of the model: see model.named_modules()")
        return modules[name]
    layer = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    if layer is None:
        raise ValueError(
            f"{type(base).__name__} does not say which module its output layer is: name it, as in output_layer='score'"
        )
    return layer


@contextmanager
def entering(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the layer's inputs, cut off from what made them."""
    found: list[Tensor] = []

    def cut(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(arguments[0].detach().requires_grad_())
        return found[-1], *arguments[1:]

    handle = layer.register_forward_pre_hook(cut)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, so nothing is kept below what is cut off."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
