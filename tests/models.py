"""Tiny models and rows of every family that the package scores: two layers, width 16, so that an oracle may loop.

Weights are drawn large and biases and norm weights are shaken, because a freshly initialised model is nearly linear
and would hide a wrong term in attention or in a norm. The draw never touches the global random state.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)


PAD = 0
IGNORED = -100
CLASSES = 3


class PlainMeanGPT2(GPT2LMHeadModel):
    """A model whose loss takes no `num_items_in_batch`: Trainer then divides the mean by the accumulation steps."""

    accepts_loss_kwargs = False


def build(
    name: str,
    *,
    dropout: float = 0.0,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    width: int = 16,
    layers: int = 2,
    vocabulary: int = 61,
    seed: int = 0,
) -> PreTrainedModel:
    """The model called `name`, the same weights for the same seed."""
    gpt2 = {
        "vocab_size": vocabulary,
        "n_positions": 16,
        "n_embd": width,
        "n_layer": layers,
        "n_head": 2,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
    }
    neox = {
        "vocab_size": vocabulary,
        "max_position_embeddings": 16,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
    }
    llama = {
        "vocab_size": vocabulary,
        "max_position_embeddings": 16,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_dropout": dropout,
    }
    common = {
        "attn_implementation": attention,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": PAD,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        match name:
            case "gpt2":
                model = GPT2LMHeadModel(GPT2Config(**gpt2, **common))
            case "gpt2-untied":
                model = GPT2LMHeadModel(GPT2Config(**gpt2, **common, tie_word_embeddings=False))
            case "gpt2-plain-mean":
                model = PlainMeanGPT2(GPT2Config(**gpt2, **common))
            case "neox":
                model = GPTNeoXForCausalLM(GPTNeoXConfig(**neox, **common))
            case "llama":
                model = LlamaForCausalLM(LlamaConfig(**llama, **common))
            case "gpt2-classifier":
                model = GPT2ForSequenceClassification(GPT2Config(**gpt2, **common, num_labels=CLASSES))
            case "gpt2-regressor":
                model = GPT2ForSequenceClassification(GPT2Config(**gpt2, **common, num_labels=1))
            case "llama-classifier":
                model = LlamaForSequenceClassification(LlamaConfig(**llama, **common, num_labels=CLASSES))
            case "gpt2-lora":
                adapter = LoraConfig(
                    r=3, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, lora_dropout=dropout
                )
                model = get_peft_model(GPT2LMHeadModel(GPT2Config(**gpt2, **common)), adapter)
            case "llama-lora":
                adapter = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"])
                model = get_peft_model(LlamaForCausalLM(LlamaConfig(**llama, **common)), adapter)
            case _:
                raise AssertionError(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


LANGUAGE_MODELS = ("gpt2", "gpt2-untied", "neox", "llama")
ADAPTERS = ("gpt2-lora", "llama-lora")
CLASSIFIERS = ("gpt2-classifier", "llama-classifier", "gpt2-regressor")


def text_rows(count: int, seed: int = 1, *, ragged_labels: bool = True) -> list[dict[str, Any]]:
    """`count` rows of 5 to 12 tokens.

    With `ragged_labels` each row has an ignored label near its end, every other row also some at its start (so that
    GPT-2's `num_items`, which counts first labels, and NeoX's, which does not, differ), and row 2 has no label at all.
    """
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        tokens = [draw.randrange(2, 61) for _ in range(draw.randint(5, 12))]
        labels = list(tokens)
        if ragged_labels:
            masked = draw.randint(1, len(tokens) // 2) if index % 2 else 0
            labels[:masked] = [IGNORED] * masked
            labels[-1 - draw.randrange(3)] = IGNORED
            if index == 2:
                labels = [IGNORED] * len(tokens)
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def class_rows(count: int, seed: int = 1, *, regression: bool = False) -> list[dict[str, Any]]:
    """`count` rows of tokens, each with one class (or one real target) to predict."""
    draw = random.Random(seed)
    return [
        {
            "input_ids": [draw.randrange(2, 61) for _ in range(draw.randint(5, 12))],
            "labels": draw.gauss(0, 1) if regression else draw.randrange(CLASSES),
        }
        for _ in range(count)
    ]


def rows_for(model_name: str, count: int, seed: int = 1) -> list[dict[str, Any]]:
    if model_name in CLASSIFIERS:
        return class_rows(count, seed, regression=model_name == "gpt2-regressor")
    return text_rows(count, seed)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads to the longest row. It drops every key it does not know, as collators of real projects do."""
    longest = max(len(row["input_ids"]) for row in rows)
    padding = [longest - len(row["input_ids"]) for row in rows]
    labels = [row["labels"] for row in rows]
    if isinstance(labels[0], Sequence):
        labels = [list(label) + [IGNORED] * pad for label, pad in zip(labels, padding, strict=True)]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [PAD] * pad for row, pad in zip(rows, padding, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * pad for row, pad in zip(rows, padding, strict=True)]
        ),
        "labels": torch.tensor(labels),
    }


def dataset(rows: Sequence[dict[str, Any]], ids: Sequence[int] | None = None) -> Dataset:
    """The rows as a `datasets.Dataset`, with a `sample_id` column where ids are given."""
    table = Dataset.from_list(list(rows))
    return table if ids is None else table.add_column("sample_id", list(ids))
