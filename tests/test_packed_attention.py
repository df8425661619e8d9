"""Documents of a packed row do not see each other, as transformers makes its masks, and when they do after all."""

import pytest
import torch
from datasets import Dataset
from models import IGNORED, PAD, build
from oracles import Float64
from test_pack_documents import make_tokenizer
from transformers import default_data_collator

from hf_datashapley import pack_documents


FAMILIES = ("gpt2", "neox", "llama")
DOCUMENTS = [[5, 6, 7, 8], list(range(10, 33)), [3], [40, 41, 42, 43, 44], [50, 51]]


def batch():
    """Three rows of 16; the second document begins in the first row and ends in the second."""
    packed = pack_documents(Dataset.from_dict({"input_ids": DOCUMENTS}), make_tokenizer(), 16)
    batch = default_data_collator(list(packed))
    del batch["sample_id"]
    return batch, batch.pop("document_id")


def logits(model, inputs, **settings):
    torch.manual_seed(0)  # the same dropout
    with torch.no_grad():
        return model(**{"use_cache": False, **inputs, **settings}).logits


def changed_elsewhere(inputs, own):
    """Other tokens wherever `own` is not."""
    others = (inputs["input_ids"] + 7) % 60
    return {**inputs, "input_ids": torch.where(own, inputs["input_ids"], others)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_tokens_in_one_document_do_not_move_another(name, attention, training):
    """Bit for bit, with dropout in train mode; padding is no exception."""
    model = build(name, attention=attention, dropout=0.1).train(training)
    inputs, document_id = batch()
    before = logits(model, inputs)
    for number in document_id.unique():
        own = document_id == number
        after = logits(model, changed_elsewhere(inputs, own))
        assert torch.equal(after[own], before[own])
        assert not torch.equal(after[~own], before[~own])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_its_pieces_one_by_one(name, attention):
    """Logits of each piece, and the loss: the mean of the pieces' own losses, each counting by its loss tokens."""
    model = build(name, attention=attention, dtype=torch.float64).eval()
    inputs, document_id = batch()
    with Float64():
        losses, tokens = own_losses(model, inputs, document_id)
        together = model(**inputs, use_cache=False).loss
    assert tokens == (inputs["labels"] != IGNORED).sum()
    torch.testing.assert_close(together, losses / tokens, rtol=1e-12, atol=0)


def own_losses(model, inputs, document_id):
    """The sum of all pieces' losses, and of how many tokens; and each piece's logits are held against its row's."""
    losses, tokens = 0.0, 0
    for row in range(len(document_id)):
        begins = (inputs["position_ids"][row] == 0).nonzero().flatten().tolist()
        together = logits(model, {key: value[row : row + 1] for key, value in inputs.items()})
        for begin, end in zip(begins, [*begins[1:], 16], strict=True):
            piece = inputs["input_ids"][row, begin:end].unsqueeze(0)
            alone = logits(model, {"input_ids": piece})
            torch.testing.assert_close(together[:, begin:end], alone, rtol=0, atol=1e-12)
            if document_id[row, begin] != -1 and end - begin > 1:
                losses += model(input_ids=piece, labels=piece, use_cache=False).loss * (end - begin - 1)
                tokens += end - begin - 1
    return losses, tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cause", ["attention_mask", "use_cache"])
def test_a_mask_or_a_cache_joins_the_documents(name, attention, cause):
    """What transformers does, in silence. Should this fail, it does so no longer, and `pack_documents`'s docstring and
    the refusals that rest on it may be relaxed."""
    model = build(name, attention=attention).eval()
    inputs, document_id = batch()
    own = document_id == 4
    own[:, -1] = False
    joined = {"attention_mask": torch.ones_like(document_id)} if cause == "attention_mask" else {"use_cache": True}
    before = logits(model, inputs, **joined)
    assert not torch.equal(logits(model, changed_elsewhere(inputs, own), **joined)[own], before[own])


def test_padding_is_a_piece_of_its_own():
    inputs, document_id = batch()
    padding = document_id == -1
    assert padding[-1].any() and (inputs["input_ids"][padding] == PAD).all()
    assert (inputs["labels"][padding] == IGNORED).all()
    assert inputs["position_ids"][padding].tolist() == list(range(padding.sum()))
