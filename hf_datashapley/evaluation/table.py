"""The table that a method is judged by: its LDS beside the trivial baselines', and the noise ceiling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .lds import LinearDatamodelingScore, interval, lds
from .markdown import markdown


def table(
    methods: Mapping[str, Any],
    baselines: Mapping[str, Any],
    masks: Any,
    outputs: Any,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> str:
    """LDS with its interval for each method and each baseline, as Markdown.

    The resamples are the same draws for every row, so that the last column, the difference to the baseline that came
    out best, has an interval of its own, which knows that the two were lucky together.

    Args:
        methods: scores [U, Q] by name.
        baselines: likewise; `trivial_baselines` makes them: same source, BM25, cosines, loss.
        masks, outputs, confidence, resamples, seed: as `lds` takes them.

    Raises:
        ValueError: no baseline, or two rows of one name.
    """
    if not baselines:
        raise ValueError(
            "baselines is empty: give trivial ones too (evaluation.baselines: same_source, bm25, cosine, own_loss), "
            "since an LDS without them says little"
        )
    twice = set(methods) & set(baselines)
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} is among both methods and baselines: name each row once")

    def score(scores: Any) -> LinearDatamodelingScore:
        return lds(scores, masks, outputs, confidence=confidence, resamples=resamples, seed=seed)

    trivial = {name: score(scores) for name, scores in baselines.items()}
    best = max(trivial.values(), key=lambda found: found.mean)
    rows = []
    for name, scores in methods.items():
        found = score(scores)
        low, high = interval(found.resampled - best.resampled, confidence)
        rows.append([name, *cells(found), f"{found.mean - best.mean:+.3f} ({low:+.3f} to {high:+.3f})"])
    rows += [[f"{name} (baseline)", *cells(found), ""] for name, found in trivial.items()]
    if not math.isnan(best.ceiling):
        rows.append(["noise ceiling", f"{best.ceiling:.3f}", "", ""])
    return markdown(["scores", "LDS", f"{confidence:.0%} interval", "above the best baseline"], rows)


def cells(found: LinearDatamodelingScore) -> list[str]:
    return [f"{found.mean:.3f}", f"{found.low:.3f} to {found.high:.3f}"]
