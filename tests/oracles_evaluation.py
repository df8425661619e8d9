"""What scores are held against, slow and obvious: loops over subsets, queries and units, written from the definitions.

Nothing here imports hf_datashapley.
"""

import math
from collections import Counter

import numpy as np


def mean_ranks(numbers):
    """From 1; equals share their mean rank: those below, and half of the others that are equal."""
    return [1 + sum(b < a for b in numbers) + (sum(b == a for b in numbers) - 1) / 2 for a in numbers]


def pearson(left, right):
    left, right = np.asarray(left, float), np.asarray(right, float)
    left, right = left - left.mean(), right - right.mean()
    scale = math.sqrt((left**2).sum() * (right**2).sum())
    return float((left * right).sum() / scale) if scale else 0.0


def spearman(left, right):
    return pearson(mean_ranks(left), mean_ranks(right))


def lds_of_query(scores, masks, losses):
    """`scores` of the units for one query, `losses` of that query after retraining on each subset."""
    predicted = [-math.fsum(score for score, inside in zip(scores, mask, strict=True) if inside) for mask in masks]
    return spearman(predicted, losses)


def bm25(documents, query, k1=1.5, b=0.75):
    """Lucene's BM25 of each document, a list of words; repeated words of the query count again."""
    mean_length = sum(len(document) for document in documents) / len(documents)
    found = []
    for document in documents:
        counts, total = Counter(document), 0.0
        for word in query:
            having = sum(word in other for other in documents)
            if having:
                weight = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
                length = 1 - b + b * len(document) / mean_length
                total += weight * counts[word] / (counts[word] + k1 * length)
        found.append(total)
    return found
