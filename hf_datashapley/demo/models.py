"""The model of the demo: a small GPT-2, Pythia or Llama from scratch, or one from a folder.

Dropout is off: text is seen once. GPT-2's activation is `gelu_pytorch_tanh`, the function of its `gelu_new` in one
kernel. A Llama has half as many key-value heads as heads, as the larger ones of its family.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)


FAMILIES = ("gpt2", "pythia", "llama")
SIZES = {"2m": (3, 192), "5m": (5, 256), "20m": (8, 448)}  # layers, width; a bit more or less by family
NAMES = [f"{family}-{size}" for family in FAMILIES for size in SIZES]
HEAD_WIDTH = 64
VOCABULARY = 4096


def make_model(name: str, vocabulary: int, row_tokens: int, seed: int) -> PreTrainedModel:
    """A named size, fresh, or the model of a folder, in float32.

    Raises:
        ValueError: neither a name nor a folder with a causal language model.
    """
    set_seed(seed)
    if name in NAMES:
        return AutoModelForCausalLM.from_config(_config(name, vocabulary, row_tokens), attn_implementation="sdpa")
    _check_folder(name)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True)
    return model


def _config(name: str, vocabulary: int, row_tokens: int) -> PretrainedConfig:
    family, size = name.split("-")
    layers, width = SIZES[size]
    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if family == "gpt2":
        return GPT2Config(
            **common,
            n_positions=row_tokens,
            n_embd=width,
            n_layer=layers,
            n_head=width // HEAD_WIDTH,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    shape = {
        "max_position_embeddings": row_tokens,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // (HEAD_WIDTH // 2),
    }
    if family == "pythia":
        return GPTNeoXConfig(**common, **shape, intermediate_size=4 * width)
    return LlamaConfig(
        **common,
        **shape,
        intermediate_size=8 * width // 3,
        num_key_value_heads=width // HEAD_WIDTH,
        tie_word_embeddings=True,
    )


def tokenizer_of(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the model's folder; None for a named size, or where there is none.

    Raises:
        ValueError: it has more tokens than the model.
    """
    if name in NAMES:
        return None
    folder = _check_folder(name)
    if not any(folder.glob("tokenizer*")):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, local_files_only=True)
    vocabulary, _ = limits_of(name)
    if len(tokenizer) > vocabulary:
        raise ValueError(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, but the model only {vocabulary}")
    return tokenizer


def limits_of(name: str) -> tuple[int, int | None]:
    """The vocabulary that a tokenizer for the model may have, and its longest row (None: no limit)."""
    if name in NAMES:
        return VOCABULARY, None
    _check_folder(name)
    config = AutoConfig.from_pretrained(name, local_files_only=True)
    return config.vocab_size, config.max_position_embeddings


def _check_folder(name: str) -> Path:
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--model {name}: neither a named size nor a folder with a config.json. The sizes are {', '.join(NAMES)}"
        )
    return folder
