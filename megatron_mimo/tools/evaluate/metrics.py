"""Scores of an answer against what is expected, 0 to 1. Pure functions of texts."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_mimo.tools.evaluate.vqa_text import normalise_vqa

Name = Literal["exact-match", "multiple-choice", "vqa", "relaxed", "anls"]

_ANLS_THRESHOLD = 0.5
_RELATIVE_CHANGE = 0.05
_FULL_AGREEMENT = 3  # people who give an answer that is worth a full point
# "B", "(B)", "B.", "B) Red"; not "A red car". And "the answer is (B)", "Answer: B".
_LETTER_FIRST = re.compile(r"\(?([A-Za-z])(?:\W*$|[).:]\s)")
_LETTER_SAID = re.compile(r"\banswer(?: is|:)\s*\(?([A-Z])\b(?![^\W\d_])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a sample expects of an answer.

    Attributes:
        references: Texts of right answers, one at least.
        choices: Texts of the choices; empty where the question offers none.
    """

    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


def normalise(text: str) -> str:
    """A text without regard to case, to white space around it and to how much is inside of it.

    One full stop at its end does not count either.
    """
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, else 0; both are normalised (`normalise`).

    That is `exact_match` of Hugging Face's evaluate with `ignore_case`, which regards white space
    and the full stop (https://huggingface.co/spaces/evaluate-metric/exact_match).

    Args:
        answer: Answer of the model.
        references: Right answers.
    """
    return float(normalise(answer) in map(normalise, references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of VQA: how many people gave this answer, of three who are needed for a full point.

    Each reference in turn is left out; against the others the answer has min(n / 3, 1), where n of
    them equal it. The score is the mean of these. With ten answers of which n equal it, that is
    0, 0.3, 0.6, 0.9 and 1 for n from 0 to 4. Antol et al. 2015, https://arxiv.org/abs/1505.00468,
    and https://visualqa.org/evaluation.html, which defines the normalisation (`normalise_vqa`).

    Args:
        answer: Answer of the model.
        references: Answers of people, ten in VQA; each counts, also where several are equal.
    """
    said = normalise_vqa(answer)
    equal = [normalise_vqa(reference) == said for reference in references]
    scores = [min(1.0, (sum(equal) - left_out) / _FULL_AGREEMENT) for left_out in equal]
    return sum(scores) / len(scores)


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is within 5 % of a reference that is a number, or equals one that is not.

    "12%" is the number 0.12, and case does not count. A reference of 0 has no 5 %, and is compared
    as a text. Masry et al. 2022, https://arxiv.org/abs/2203.10244, section 5.1, after Methani et
    al. 2020; numbers are read as in the evaluation of Pix2Struct, which others have taken over.

    Args:
        answer: Answer of the model.
        references: Right answers; one is enough.
    """
    said = answer.strip()
    return float(any(_is_near(said, reference.strip()) for reference in references))


def _is_near(answer: str, reference: str) -> bool:
    said, expected = _number(answer), _number(reference)
    if said is None or not expected:
        return answer.lower() == reference.lower()
    return abs(said - expected) / abs(expected) <= _RELATIVE_CHANGE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: 1 less the share of characters that differ.

    The best of the references counts; below 0.5 the score is 0. Case and the amount of white space
    do not count. Biten et al. 2019, https://arxiv.org/abs/1905.13648, equation 1. At exactly 0.5
    the paper says 0, and the evaluation of its challenge, which is followed here, 0.5
    (https://rrc.cvc.uab.es/?ch=11).

    Args:
        answer: Answer of the model.
        references: Right answers.
    """
    said = " ".join(answer.lower().split())
    best = max(_similarity(said, " ".join(text.lower().split())) for text in references)
    return best if best >= _ANLS_THRESHOLD else 0.0


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    return 1 - edit_distance(a, b) / longest if longest else 1.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements of a character.

    Wagner and Fischer 1974, https://doi.org/10.1145/321796.321811, in one row of the table.
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def multiple_choice(answer: str, expected: Expected) -> float:
    """1 if the answer names the right choice, by its text or by its letter, else 0.

    Answer and references are read alike (`choice_named`); A is the first choice. An answer that
    names none is wrong: nothing is guessed, unlike in the evaluation of MMMU (Yue et al. 2023,
    https://arxiv.org/abs/2311.16502), which draws a choice then.

    Args:
        answer: Answer of the model.
        expected: References and choices; a reference that names no choice is never right.
    """
    named = choice_named(answer, expected.choices)
    right = {choice_named(reference, expected.choices) for reference in expected.references}
    return float(named is not None and named in right)


def choice_named(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a text names; None for none.

    It is the choice with this text (`normalise`), else the one with the letter that the text is or
    begins with ("B", "(B)", "B.", "B) Red"), else the letter behind "answer is" or "answer:".
    """
    plain = list(map(normalise, choices))
    if normalise(text) in plain:
        return plain.index(normalise(text))
    found = _LETTER_FIRST.match(text.strip()) or _LETTER_SAID.search(text)
    index = ord(found[1].upper()) - ord("A") if found else len(choices)
    return index if index < len(choices) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric in the table of them.

    Attributes:
        title: Its name in words.
        is_graded: Whether scores lie between 0 and 1 too.
        applies: Whether a sample can be scored by it.
        score: Score of an answer, 0 to 1.
        needs: What a sample has to have for it, in words.
    """

    title: str
    is_graded: bool = False
    applies: Callable[[Expected], bool]
    score: Callable[[str, Expected], float]
    needs: str


METRICS: Mapping[Name, Metric] = {
    "exact-match": Metric(
        title="exact match",
        applies=lambda expected: True,
        score=lambda answer, expected: exact_match(answer, expected.references),
        needs="an answer",
    ),
    "multiple-choice": Metric(
        title="multiple choice",
        applies=lambda expected: len(expected.choices) > 1,
        score=multiple_choice,
        needs="two choices or more",
    ),
    "vqa": Metric(
        title="VQA accuracy",
        is_graded=True,
        # With fewer, no answer would have a full point.
        applies=lambda expected: len(expected.references) > _FULL_AGREEMENT,
        score=lambda answer, expected: vqa_accuracy(answer, expected.references),
        needs="four answers or more",
    ),
    "relaxed": Metric(
        title="relaxed accuracy",
        applies=lambda expected: True,
        score=lambda answer, expected: relaxed_accuracy(answer, expected.references),
        needs="an answer",
    ),
    "anls": Metric(
        title="ANLS",
        is_graded=True,
        applies=lambda expected: True,
        score=lambda answer, expected: anls(answer, expected.references),
        needs="an answer",
    ),
}
"""The metrics by the names that flags and files have for them."""


def scores_of(answer: str, expected: Expected, chosen: Sequence[Name]) -> dict[Name, float]:
    """Scores of an answer by the chosen metrics that apply to its sample.

    Without a choice a sample that has choices is scored by multiple choice, and any other by exact
    match.

    Args:
        answer: Answer of the model.
        expected: What the sample expects.
        chosen: Names of metrics; empty for the one that suits the sample.
    """
    by_choice: Name = "multiple-choice"
    suits: Name = by_choice if METRICS[by_choice].applies(expected) else "exact-match"
    return {
        name: METRICS[name].score(answer, expected)
        for name in chosen or (suits,)
        if METRICS[name].applies(expected)
    }
