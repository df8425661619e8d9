"""Real pretrained models, as they come with `from_pretrained`.

They are not part of the project: DATASHAPLEY_REAL_MODELS names the folder that they lie in (scripts/fetch_smollm2.py
fetches the larger one).
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_datashapley import GradDot, Influence, Trak


FOLDER = os.environ.get("DATASHAPLEY_REAL_MODELS")
MODELS = [
    pytest.param(("stories260K", 1024), id="stories260K"),
    pytest.param(("SmolLM2-135M", 2048), id="SmolLM2-135M", marks=pytest.mark.slow),
]
TRAIN = [
    "Once upon a time, there was a little girl named Lily. She loved to play with her red ball in the park.",
    "One day, a big dog came to the park and took the ball. Lily was sad and began to cry.",
    "The function returns the sum of its arguments. If no argument is given, it returns zero.",
    "Tom had a toy car. He gave it to his friend Sam, and they played all day long.",
]
QUERIES = [
    "Lily saw the dog with her ball and she was very sad.",
    "The function takes an argument and returns its sum.",
]


@pytest.fixture(params=MODELS)
def real(request):
    name, width = request.param
    folder = Path(FOLDER or ".") / name
    if FOLDER is None or not folder.is_dir():
        pytest.skip(f"needs DATASHAPLEY_REAL_MODELS, a folder with {name} in it")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), width


def rows(tokenizer, texts):
    return [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text)["input_ids"][:24] for text in texts)]


def gradient(model, row, mean):
    ids = torch.tensor([row["input_ids"]])
    losses = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    loss = losses.mean() if mean else losses.sum()
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def test_scores_are_autograds(real):
    model, tokenizer, _ = real
    train, queries = rows(tokenizer, TRAIN), rows(tokenizer, QUERIES)
    scores = GradDot(model, batch_size=1, progress=False).fit(train).score(queries)
    expected = np.zeros_like(scores, dtype=np.float64)
    for q, query in enumerate(queries):
        of_query = gradient(model, query, mean=True)
        for i, row in enumerate(train):
            pairs = zip(gradient(model, row, mean=False), of_query, strict=True)
            expected[i, q] = sum(float((a.double() * b.double()).sum()) for a, b in pairs)
    assert np.abs(scores - expected).max() < 1e-5 * np.abs(expected).max()


def test_alike_finds_alike(real):
    """A text is the one that most lowers its own loss, by every estimator and through every projection."""
    model, tokenizer, width = real
    train = rows(tokenizer, TRAIN)
    for make in (GradDot, Influence, Trak):
        for projection in ("logra", "sjlt"):
            estimator = make(model, projection_dim=width, projection=projection, batch_size=1, progress=False)
            scores = estimator.fit(train).score(train)
            assert (scores.argmax(0) == np.arange(len(train))).all(), (make, projection, scores)
