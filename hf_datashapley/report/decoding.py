"""Tokens back into the text that each of them stands for.

A token of a byte-level vocabulary may be a part of a character, and a token of a sentence-piece vocabulary may have a
blank only where another one stands before it. So a token's text is what the decoded text grows by when the token is
added to those before it, and tokens that end within a character wait for the ones that complete it: they are one span.
Some decodings of a few tokens for each token. Spans joined are the decoded text, but for characters that are cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A character has four bytes, so whatever is longer is no character in the making but broken text.
LONGEST_WAIT = 8


@dataclass(frozen=True)
class Span:
    text: str
    tokens: int  # that it stands for


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """All of it, special tokens included.

    Raises:
        ValueError: a token is not in the vocabulary.
    """
    unknown = max(token_ids, default=0)
    if unknown >= len(tokenizer):
        raise ValueError(
            f"--tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, and the rows of --dataset hold token "
            f"{unknown}: name the tokenizer that made these rows"
        )
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def decode_spans(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[Span]:
    """Raises: ValueError, see `decode`."""
    spans: list[Span] = []
    before = start = 0  # where the last span began, and where the next one does
    while start < len(token_ids):
        known = decode(tokenizer, token_ids[before:start])
        for end in range(start + 1, min(start + LONGEST_WAIT, len(token_ids)) + 1):
            grown = decode(tokenizer, token_ids[before:end])
            if grown.startswith(known) and not grown.endswith(INCOMPLETE):
                break
        text = grown[len(known) :] if grown.startswith(known) else decode(tokenizer, token_ids[start:end])
        if text.count(INCOMPLETE) > decode(tokenizer, token_ids[start + 1 : end]).count(INCOMPLETE):
            # The first token is the end of a character that began elsewhere, or the beginning of one that is cut off.
            # What comes next is read without it, or would be broken too.
            spans.append(Span(decode(tokenizer, token_ids[start : start + 1]), 1))
            before = start = start + 1
        else:
            spans.append(Span(text, end - start))
            before, start = start, end
    return spans
