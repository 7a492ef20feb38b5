"""How much a text is like a reference, from 0 to 1, by metrics of machine translation and summarization.

Sources: BLEU, Papineni et al. 2002, smoothed as NIST's mteval-v13a (method 3 of Chen and Cherry 2014); GLEU, Wu et al. 2016,
arXiv:1609.08144, section 4.3; ROUGE, Lin 2004. Not covered: METEOR (needs WordNet) and cosine (needs embeddings).
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.gleu_score import sentence_gleu
from nltk.util import ngrams
from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

from core.grader_specs import TextSimilarityGrader as TextSimilaritySpec
from graders.grade import Grade, GradeFailure, GradeRequest, failed
from graders.template import InvalidVariable, render, ungradable

MAX_CHARACTERS = 200_000
"""Of either text: keeps one grade below a second."""

_TOKENIZER = NLTKWordTokenizer()
_SMOOTHING = SmoothingFunction().method3


def fuzzy_match(text: str, reference: str) -> float:
    """Characters in their common subsequence, twice, over the characters of both."""
    return fuzz.ratio(text, reference) / 100


def bleu(text: str, reference: str) -> float:
    """Of up to four words, the orders that a shorter text does not have left out, so that a text is always fully like itself."""
    words = _TOKENIZER.tokenize(text)
    return float(sentence_bleu([_TOKENIZER.tokenize(reference)], words, smoothing_function=_SMOOTHING, auto_reweigh=True))


def gleu(text: str, reference: str) -> float:
    return float(sentence_gleu([_TOKENIZER.tokenize(reference)], _TOKENIZER.tokenize(text)))


def rouge_n(n: int, text: str, reference: str) -> float:
    """F1 over the n-grams. A text with fewer than n words has none and is like nothing."""
    found, wanted = Counter(ngrams(rouge_words(text), n)), Counter(ngrams(rouge_words(reference), n))
    return _f1((found & wanted).total(), found.total(), wanted.total())


def rouge_l(text: str, reference: str) -> float:
    """F1 over the longest common subsequence of words."""
    found, wanted = rouge_words(text), rouge_words(reference)
    return _f1(LCSseq.similarity(found, wanted), len(found), len(wanted))


def rouge_words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, of every script; without stemming."""
    return re.findall(r"[^\W_]+", text.lower())


def _f1(num_common: int, num_found: int, num_wanted: int) -> float:
    """The harmonic mean of precision and recall."""
    return 2 * num_common / (num_found + num_wanted) if num_common else 0.0


METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    **{f"rouge_{n}": partial(rouge_n, n) for n in range(1, 6)},
    "rouge_l": rouge_l,
}


class TextSimilarityGrader:
    def __init__(self, spec: TextSimilaritySpec) -> None:
        self._spec = spec
        self._similarity = METRICS[spec.evaluation_metric]

    async def grade(self, request: GradeRequest) -> Grade:
        try:
            text = render(self._spec.input, request.item, request.sample)
            reference = render(self._spec.reference, request.item, request.sample)
        except InvalidVariable as error:
            return ungradable(error)
        if max(len(text), len(reference)) > MAX_CHARACTERS:
            return failed(GradeFailure.REQUEST_INVALID, f"A text of more than {MAX_CHARACTERS} characters is not compared.")
        return Grade(self._similarity(text, reference))

    async def close(self) -> None:
        """Holds nothing."""
