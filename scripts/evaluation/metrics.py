"""How an answer that a model wrote counts: the metrics of LongBench and RULER, each as its authors' scorer has it.

Every metric takes what was said and one reference answer, and gives 0 to 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache, partial
from importlib.util import find_spec
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.tasks import Written

PUNCTUATION_ZH = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: E501, RUF001
"""That LongBench leaves out of Chinese answers."""


def score(item: Written, said: str) -> float:
    """Of one answer: its best over the references, or the mean over them where all are asked for."""
    if item.first_line:
        said = said.lstrip("\n").split("\n")[0]
    metric = (METRICS | {"classification": partial(classified, classes=item.classes)})[item.metric]
    found = [metric(said, reference) for reference in item.references]
    return fmean(found) if item.every else max(found)


def require(metric: str, task: str) -> None:
    """Raises ValueError where a metric's packages aren't installed; the message names the task."""
    if missing := [name for name in PACKAGES.get(metric, ()) if find_spec(name) is None]:
        raise ValueError(
            f"task {task} is scored with {' and '.join(missing)}: pip install -e '.[benchmarks]', or take the task out "
            "of the directory"
        )


def f1(said: Sequence[str], truth: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, whatever their order."""
    same = (Counter(said) & Counter(truth)).total()
    return 2 * same / (len(said) + len(truth)) if same else 0.0


def words(text: str) -> list[str]:
    """In lower case, without punctuation and articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def words_zh(text: str) -> list[str]:
    """Segments without punctuation, white space and what is nothing else."""
    table = str.maketrans("", "", string.punctuation + PUNCTUATION_ZH)
    found = ("".join(part.lower().translate(table).split()) for part in segments(text))
    return [word for word in found if word]


def segments(text: str) -> list[str]:
    """Chinese words, by jieba."""
    return _jieba().lcut(text)


def rouge_l(said: str, truth: str) -> float:
    """F of ROUGE-L by the package ``rouge``; 0 where it gives up, on empty texts and on very long sentences."""
    try:
        return _rouge().get_scores(said, truth)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


def share_of_numbers(said: str, truth: str) -> float:
    """How many of all numbers in the answer are the right one."""
    numbers = re.findall(r"\d+", said)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def paragraph(said: str, truth: str) -> float:
    """As ``share_of_numbers``, of the one in the reference "Paragraph 7" or "段落7"."""
    [number, *_] = re.findall(r"(?:Paragraph |段落)(\d+)", truth)
    return share_of_numbers(said, number)


def classified(said: str, truth: str, classes: Sequence[str]) -> float:
    """One over how many of the classes are named, if the right one is; parts of its name don't count."""
    named = [name for name in classes if name in said]
    at = 0
    while at < len(named):
        if named[at] in truth and named[at] != truth:
            del named[at]
        at += 1  # also past a name that moved up: the authors' scorer skips it, and so do the published figures
    return 1 / len(named) if truth in named else 0.0


def code(said: str, truth: str) -> float:
    """Similarity, in whole per cent, of the answer's first line that is neither comment nor markup."""
    lines = said.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == truth:
        return 1.0
    return round(100 * SequenceMatcher(None, line, truth).ratio()) / 100


def contains(said: str, truth: str) -> float:
    """Whether the reference occurs, in any case."""
    return float(truth.lower() in re.sub(r"[\x00-\x1f]", "\n", said.strip()).strip().lower())


@cache
def _rouge() -> Any:
    import rouge

    return rouge.Rouge(metrics=["rouge-l"])


@cache
def _jieba() -> Any:
    import jieba

    jieba.setLogLevel("WARNING")
    return jieba


METRICS: dict[str, Callable[[str, str], float]] = {
    "qa_f1": lambda said, truth: f1(words(said), words(truth)),
    "qa_f1_zh": lambda said, truth: f1(words_zh(said), words_zh(truth)),
    "rouge": rouge_l,
    "rouge_zh": lambda said, truth: rouge_l(" ".join(segments(said)), " ".join(segments(truth))),
    "retrieval": paragraph,
    "count": share_of_numbers,
    "code": code,
    "contains": contains,
}
"""By name, but for ``classification``, which needs an item's classes."""
PACKAGES = {"rouge": ("rouge",), "rouge_zh": ("rouge", "jieba"), "qa_f1_zh": ("jieba",)}
"""What a metric needs beside the standard library: the optional extra ``benchmarks``."""
