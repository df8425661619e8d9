"""Documents token by token: which few are shown, and how deep the colour of each token is for each target.

A token's colour is its value over the document's scale for that target, in a few steps; 0 has none, nor has what
rounds to it. The scale is where nearly all tokens of the document end, so that one huge token does not bleach the
others; what lies beyond has the full colour. A span of several tokens (a character they share) has their sum. All
targets are in the page, and which is seen is a radio button and a style sheet: no script, and paper shows the chosen
one.

Sizes, as suffixes: T tokens of a piece, S spans, K targets, C units with token values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_datashapley.report.aggregate import Floats, Ints
from hf_datashapley.report.decoding import Span
from hf_datashapley.report.documents import Known
from hf_datashapley.report.nats import NatScale


SHOWN = 24  # units, over all targets
SPANS = 600  # of a document
LEVELS = 8  # of colour, for either sign
WITHIN_SCALE = 0.98  # of the document's tokens


@dataclass(frozen=True)
class Piece:
    """What a unit has in one sample."""

    sample_id: int
    token_T: Ints  # in the vocabulary
    value_KT: Floats  # nats; nan where a token has no loss


@dataclass(frozen=True)
class TokenTexts:
    """Which units have token values, and where these and the tokens come from for the few that are shown."""

    unit_C: Ints  # ids of the units that have token values
    value_KC: Floats  # nats, sums over these values
    read: Callable[[int], list[Piece]]  # by a unit's id; at least one piece with a value
    decode: Callable[[Sequence[int]], list[Span]]


@dataclass(frozen=True)
class ColouredSpan:
    text: str
    tokens: int
    classes: str
    nats: list[str]  # for each target, as a person reads it; empty where there is no loss


@dataclass(frozen=True)
class ColouredPiece:
    sample_id: int
    spans: list[ColouredSpan]


@dataclass(frozen=True)
class TokenDocument:
    number: str
    title: str | None
    group: str
    value_K: Floats  # nats, of the whole unit
    shown_K: Floats  # of its tokens that have values of their own
    place_K: list[int]  # by value for each target, the most first
    full_K: Floats  # nats, where the colour is full
    scale_K: list[NatScale]  # of the tokens' numbers
    head_K: list[NatScale]  # of sums
    tokens: int  # with a value of their own
    pieces: list[ColouredPiece]
    cut: bool

    @property
    def is_whole(self) -> bool:
        """Whether its tokens' values are all of its value, as far as numbers of eight digits tell."""
        return bool(np.allclose(self.shown_K, self.value_K, rtol=1e-6, atol=1e-12 + 1e-6 * self.full_K.max()))


def token_documents(known: Known, texts: TokenTexts) -> list[TokenDocument]:
    """Of the units with token values, those whose tokens helped and hurt each target most.

    Ranked by what is coloured, which need not be all of a unit: a document may have other pieces, in other samples.
    """
    assert not known.corpus.has_documents, "tokens are those of the units that have values"
    chosen = choose(texts.value_KC)
    order_KC = [sorted(chosen, key=lambda c: -value_C[c]) for value_C in texts.value_KC]
    # As they stand for the first target, which is shown first.
    return [_coloured(known, texts, c, [order_C.index(c) for order_C in order_KC]) for c in order_KC[0]]


def choose(value_KC: Floats, shown: int = SHOWN) -> list[int]:
    """From both ends for each target in turn, until there are `shown`."""
    lines = []
    for value_C in value_KC:
        rising = value_C.argsort(kind="stable")
        lines += [rising[::-1], rising]
    chosen: dict[int, None] = {}
    for rank in range(min(value_KC.shape[1], shown)):
        for line in lines:
            if len(chosen) < shown:
                chosen[int(line[rank])] = None
    return list(chosen)


def _coloured(known: Known, texts: TokenTexts, c: int, place_K: list[int]) -> TokenDocument:
    unit_id = int(texts.unit_C[c])
    d = known.place(unit_id)
    pieces = texts.read(unit_id)
    spans = [texts.decode(piece.token_T.tolist()) for piece in pieces]
    value_KS = [_span_values(piece.value_KT, found) for piece, found in zip(pieces, spans, strict=True)]
    full_K = np.array([_full(value_S) for value_S in np.concatenate(value_KS, axis=1)])
    scale_K = [NatScale.fitting(full) for full in full_K]
    coloured, left = [], SPANS
    for piece, found, values in zip(pieces, spans, value_KS, strict=True):
        if left > 0:
            shown = zip(found[:left], values.T, strict=False)
            coloured.append(ColouredPiece(piece.sample_id, [_span(s, v, full_K, scale_K) for s, v in shown]))
        left -= len(found)
    value_K, shown_K = known.corpus.value_KD[:, d], texts.value_KC[:, c]
    return TokenDocument(
        number=known.number(d),
        title=known.title(d),
        group=known.group(d),
        value_K=value_K,
        shown_K=shown_K,
        place_K=place_K,
        full_K=full_K,
        scale_K=scale_K,
        head_K=[NatScale.fitting(both) for both in zip(value_K, shown_K, strict=True)],
        tokens=int(sum((~np.isnan(piece.value_KT[0])).sum() for piece in pieces)),
        pieces=coloured,
        cut=left < 0,
    )


def _span_values(value_KT: Floats, spans: list[Span]) -> Floats:
    """[K, S]; nan for spans none of whose tokens has a value."""
    span_T = np.repeat(np.arange(len(spans)), [span.tokens for span in spans])
    known_T = ~np.isnan(value_KT[0])
    value_KS = np.full((len(value_KT), len(spans)), np.nan)
    value_KS[:, span_T[known_T]] = 0.0
    for value_S, value_T in zip(value_KS, value_KT, strict=True):
        np.add.at(value_S, span_T[known_T], value_T[known_T])
    return value_KS


def _full(value_S: Floats) -> float:
    size = np.abs(value_S[~np.isnan(value_S)])
    return float(np.quantile(size, WITHIN_SCALE, method="higher")) if len(size) else 0.0


def level(value: float, full: float) -> int:
    """From -LEVELS to LEVELS; half a step to either side of 0 is 0."""
    if full == 0.0:
        return 0
    return round(LEVELS * min(max(value / full, -1.0), 1.0))


def _span(span: Span, value_K: Floats, full_K: Floats, scale_K: list[NatScale]) -> ColouredSpan:
    line = ["line"] if "\n" in span.text and span.text.isspace() else []
    if np.isnan(value_K[0]):
        return ColouredSpan(span.text, span.tokens, " ".join(["none", *line]), [])
    level_K = [level(value, full) for value, full in zip(value_K, full_K, strict=True)]
    colours = [f"{'p' if x > 0 else 'n'}{k}-{abs(x)}" for k, x in enumerate(level_K) if x]
    nats = [f"{scale.signed(value)} {scale.unit}" for value, scale in zip(value_K, scale_K, strict=True)]
    return ColouredSpan(span.text, span.tokens, " ".join([*colours, *line]), nats)
