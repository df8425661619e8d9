"""Junk documents, planted with their type known: does a value find what nobody would want to train on?

Four kinds that web corpora really hold. Shuffled words keep the vocabulary of real text and lose its order, repetition
keeps the order and says nothing new (its perplexity is low), base64 and random characters are not language at all.
"""

from __future__ import annotations

import base64
import random
import string
from collections.abc import Sequence

from .corpus import Document


DOMAIN = "junk"
TYPES = ("shuffled words", "repetition", "base64", "random characters")
TOKENS = (100, 800)  # length of a junk document
# Characters that a byte-level BPE of this size spends a token on, roughly: only the documents' lengths depend on it.
CHARACTERS_PER_TOKEN = {"shuffled words": 3.5, "repetition": 3.5, "base64": 1.5, "random characters": 1.2}


def plant_junk(real: Sequence[Document], tokens: int, seed: int) -> list[Document]:
    """Junk of every type, about `tokens` tokens in all, made out of `real` text where it is made of words."""
    generator = random.Random(seed)
    planted: list[Document] = []
    for kind in TYPES:
        left = tokens / len(TYPES)
        while left > 0:
            length = generator.randint(*TOKENS)
            left -= length
            text = _make(kind, int(length * CHARACTERS_PER_TOKEN[kind]), real, generator)
            planted.append(Document(text, DOMAIN, f"{kind} {len(planted) + 1}", junk=kind))
    return planted


def _make(kind: str, characters: int, real: Sequence[Document], generator: random.Random) -> str:
    if kind == "base64":
        encoded = base64.b64encode(generator.randbytes(characters * 3 // 4)).decode()
        return "\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76))
    if kind == "random characters":
        return "".join(generator.choices(string.printable.strip() + " ", k=characters))
    source = generator.choice(real).text
    start = generator.randrange(max(1, len(source) - characters))
    words = source[start : start + characters].split() or ["nothing"]
    if kind == "shuffled words":
        generator.shuffle(words)
        return " ".join(words)
    phrase = " ".join(words[: generator.randint(4, 12)])
    return " ".join([phrase] * (characters // (len(phrase) + 1) + 1))
