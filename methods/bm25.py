"""BM25: what a search engine finds when a query's text is searched for among the training texts."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from methods.base import Method, Problem
from methods.baselines import label_is_an_order
from methods.representation import by_label
from tasks.base import Examples, Task
from tasks.errors import require


@dataclass(frozen=True)
class BM25(Method):
    """score(q, i) = ± Σ_t c_q(t) idf(t) c_i(t) (k1 + 1) / (c_i(t) + k1 (1 − b + b |i| / mean |j|))

    c(t): how often the word t is in a text, |i|: words of the text (Robertson & Zaragoza 2009, §3.4, a query's words
    counted as often as they occur). idf(t) = ln(1 + (N − n_t + ½) / (n_t + ½)), n_t the texts with t: with the 1 it is
    never negative. + where the labels agree, − where they do not.
    `k1`: how soon more of the same word stops counting; `b`: 1 takes the length of a text fully into account, 0 not.
    """

    k1: float
    b: float
    needs = frozenset({"texts", "labels"})

    def __post_init__(self) -> None:
        require(self.k1 >= 0, "method.k1", self.k1, "0 or more")
        require(0 <= self.b <= 1, "method.b", self.b, "0 <= b <= 1")

    def unmet(self, task: Task) -> str | None:
        return label_is_an_order(task) or super().unmet(task)

    def attribute(self, problem: Problem, queries: Examples) -> Tensor:
        from scipy.sparse import csr_array
        from sklearn.feature_extraction.text import CountVectorizer

        assert problem.train.texts is not None and queries.texts is not None
        vectorizer = CountVectorizer(token_pattern=r"\S+")
        counts = csr_array(vectorizer.fit_transform(problem.train.texts), dtype=np.float64)  # (N, V)
        lengths, texts = counts.sum(1), np.bincount(counts.indices, minlength=counts.shape[1])
        idf = np.log1p((len(problem.train) - texts + 0.5) / (texts + 0.5))
        rows, c = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr)), counts.data
        saturated = c * (self.k1 + 1) / (c + self.k1 * (1 - self.b + self.b * lengths[rows] / lengths.mean()))
        weights = csr_array((saturated * idf[counts.indices], counts.indices, counts.indptr), counts.shape)
        asked = csr_array(vectorizer.transform(queries.texts), dtype=np.float64)
        return by_label(torch.as_tensor((asked @ weights.T).toarray()), queries, problem.train)
