"""TRAK's Q from other models than the gradients: masks in the forward term only."""

import numpy as np
import torch
from models import IGNORED, build, collate, text_rows

from hf_datashapley import DropoutEnsemble, Trak


DAMPING = 0.3


def mean_loss(model, row):
    batch = collate([row])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, :-1]
    labels = batch["labels"][0, 1:]
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED), int(labels.ne(IGNORED).sum())


def log_odds_gradient(model, row):
    """Of log(p / (1 - p)), p = exp(-mean loss), as written."""
    loss, _ = mean_loss(model, row)
    f = -loss - torch.log1p(-torch.exp(-loss))
    return torch.cat([g.flatten() for g in torch.autograd.grad(f, list(model.parameters()))])


def test_masks_in_the_forward_term_only():
    model = build("gpt2", dropout=0.3, dtype=torch.float64).eval()
    train, queries = text_rows(7, 1, ragged_labels=False), text_rows(3, 5, ragged_labels=False)
    ensemble = DropoutEnsemble(model, passes=4, forward_only=True)

    settings = {"data_collator": collate, "projection_dim": None, "damping": DAMPING, "progress": False}
    scores = Trak(ensemble, **settings).fit(train).score(queries)

    phi = torch.stack([log_odds_gradient(model, row) for row in train])
    kernel = phi @ phi.T  # of units: the same scores as of features
    mean = torch.linalg.eigvalsh(kernel).mean()
    inverse = torch.linalg.inv(kernel + DAMPING * mean * torch.eye(len(train), dtype=torch.float64))
    of_queries = torch.stack([log_odds_gradient(model, row) for row in queries])
    soft = []
    for masked in ensemble.outputs():
        with torch.no_grad():
            found = [mean_loss(masked, row) for row in train]
        soft.append([tokens * (1 - float(torch.exp(-loss))) for loss, tokens in found])
    expected = np.mean(soft, axis=0)[:, None] * (inverse @ phi @ of_queries.T).numpy()
    assert np.ptp(soft, axis=0).max() > 1e-2, "the masks make no difference"
    assert np.abs(scores - expected).max() < 1e-5 * np.abs(expected).max()

    without = Trak(model, **settings).fit(train).score(queries)
    assert np.abs(scores - without).max() > 1e-3 * np.abs(without).max()
