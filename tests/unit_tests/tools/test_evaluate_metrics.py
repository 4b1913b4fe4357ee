"""Metrics of `megatron-mimo evaluate`, against lmms-eval's own code and values worked by hand."""

import math
import random
import re
import statistics
from typing import Any

import pytest

from megatron_mimo.tools.evaluate.intervals import bootstrap, wilson
from megatron_mimo.tools.evaluate.metrics import (
    Expected,
    anls,
    choice_named,
    edit_distance,
    exact_match,
    multiple_choice,
    normalise,
    relaxed_accuracy,
    scores_of,
    vqa_accuracy,
)
from megatron_mimo.tools.evaluate.results import Tally
from megatron_mimo.tools.evaluate.vqa_text import normalise_vqa
from tests.lmms import definitions

WORDS = [
    "two", "Two", "dogs", "dog's", "a", "an", "the", "none", "10", "1,000", "1.5", "5.", "12%", "",
    "dont", "couldn'tve", "yall", "red,blue", "red, blue", "black-white", "(yes)", "no!", "U.S.",
    "3:30", "half/half", "isnt", "somebody'd", "\n", "\t", "100", "103", "106", "0", "-2", "nan",
    "kitten", "sitting", "Cafe", "Café", "?", "what's", "ten", "\"quoted\"", "$5", ".5", "9.",
]  # fmt: skip


def texts(number: int) -> list[str]:
    """Texts of a few of the words, the same each time."""
    draws = random.Random(5)
    return [" ".join(draws.choices(WORDS, k=draws.choice((1, 1, 2, 3)))) for _ in range(number)]


def test_the_normalised_text() -> None:
    assert normalise("  The\nRed  Car. ") == "the red car"
    assert normalise("STRASSE") == normalise("Straße")
    assert normalise("3.5") == "3.5" and normalise("...") == ".."


def test_exact_match_ignores_case_and_white_space() -> None:
    assert exact_match(" Red.", ["blue", "red"]) == 1
    assert exact_match("red car", ["red"]) == 0
    assert exact_match("7 3", ["73"]) == 0


def theirs_of_vqa() -> dict[str, Any]:
    found = definitions(
        "tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor", given={"re": re}
    )
    return definitions(
        "tasks/vqav2/utils.py", "vqav2_process_results", given={**found, "statistics": statistics}
    )


def test_texts_of_vqa_are_those_of_its_evaluation() -> None:
    theirs = theirs_of_vqa()["EvalAIAnswerProcessor"]()
    for text in [*WORDS, *theirs.CONTRACTIONS, *theirs.CONTRACTIONS.values(), *texts(500)]:
        plain = text.replace("\n", " ").replace("\t", " ").strip()
        wanted = theirs.process_digit_article(theirs.process_punctuation(plain))
        assert normalise_vqa(text) == wanted, text


def test_vqa_accuracy_is_that_of_its_evaluation() -> None:
    theirs, draws = theirs_of_vqa()["vqav2_process_results"], random.Random(6)
    found = set()
    for _ in range(300):
        answers = draws.choices(draws.sample(WORDS, 3), k=10)
        said = draws.choice([*answers, "something else"])
        document = {"question_id": 1, "answers": [
            {"answer": answer, "answer_id": number} for number, answer in enumerate(answers)
        ]}  # fmt: skip
        wanted = theirs(document, [said])["exact_match"]
        assert vqa_accuracy(said, answers) == pytest.approx(wanted), (said, answers)
        found.add(round(wanted, 2))
    assert {0.0, 0.3, 0.6, 0.9, 1.0} <= found


def test_vqa_accuracy_by_hand() -> None:
    # https://arxiv.org/abs/1505.00468: of ten people so many give the answer.
    for number, score in enumerate((0, 0.3, 0.6, 0.9, 1, 1, 1)):
        answers = ["yes"] * number + ["no"] * (10 - number)
        assert vqa_accuracy("Yes.", answers) == pytest.approx(score)


def test_relaxed_accuracy_is_that_of_lmms_eval() -> None:
    name = "relaxed_correctness"
    theirs = definitions("tasks/chartqa/utils.py", name, given={})[name]
    some = [text.strip() for text in [*WORDS, *texts(20)]]
    scores = [(a, b, relaxed_accuracy(a, [b]), theirs(a, b)) for a in some for b in some]
    assert all(ours == wanted for _, _, ours, wanted in scores)
    assert any(wanted and a != b for a, b, _, wanted in scores)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("105", "100", 1),
        ("105.01", "100", 0),
        ("95", "100", 1),
        ("12%", "0.12", 1),
        ("-98", "-100", 1),
        ("98", "-100", 0),
        ("Red", "red", 1),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("1,000", "1000", 0),
    ],
)
def test_relaxed_accuracy_by_hand(answer: str, reference: str, score: float) -> None:
    assert relaxed_accuracy(answer, ["nothing", reference]) == score


def test_anls_is_that_of_lmms_eval() -> None:
    file, given = "api/metrics.py", {"Callable": None}
    theirs = definitions(file, "levenshtein_distance", "anls", given=given)["anls"]
    # It takes the length before white space is removed, so texts have no more than one blank.
    some = [text for text in map(" ".join, map(str.split, texts(60))) if text]
    scores = [(anls(a, [b, "zzz"]), theirs([b, "zzz"], [a])["anls"]) for a in some for b in some]
    assert all(ours == pytest.approx(wanted) for ours, wanted in scores)
    assert any(0 < wanted < 1 for _, wanted in scores) and any(wanted == 0 for _, wanted in scores)


def test_anls_by_hand() -> None:
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3
    assert anls("sitting", ["kitten"]) == pytest.approx(1 - 3 / 7)
    assert anls("sitting", ["kitten", "Sitting"]) == 1
    assert anls("ab", ["ax"]) == 0.5 and anls("ab", ["axy"]) == 0
    assert anls("", ["abc"]) == 0


CHOICES = ("red", "green", "Blue car", "C")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("green", 1), ("  RED.", 0), ("B", 1), ("(b)", 1), ("B.", 1), ("B) green", 1),
        ("b: it is green", 1), ("The answer is B.", 1), ("Answer: (C)", 2), ("blue  car", 2),
        # A choice's text is preferred to a letter.
        ("C", 3), ("C.", 3), ("(C)", 2),
        ("A red car", None), ("E", None), ("a", 0), ("", None), ("green or red", None),
        ("I do not know", None), ("the answer is Blue", None),
    ],
)  # fmt: skip
def test_the_choice_that_a_text_names(text: str, index: int | None) -> None:
    assert choice_named(text, CHOICES) == index


def test_multiple_choice_reads_answer_and_reference_alike() -> None:
    expected = Expected(references=("B",), choices=("red", "green"))
    assert multiple_choice("green", expected) == multiple_choice("(B)", expected) == 1
    assert multiple_choice("red", expected) == multiple_choice("blue", expected) == 0
    # Neither names a choice: that is not a right answer.
    assert multiple_choice("blue", Expected(references=("blue",), choices=("a", "b"))) == 0


def test_a_sample_is_scored_by_what_suits_it() -> None:
    plain, choice = Expected(references=("x",)), Expected(references=("A",), choices=("x", "y"))
    assert scores_of("x", plain, ()) == {"exact-match": 1.0}
    assert scores_of("x", choice, ()) == {"multiple-choice": 1.0}
    assert scores_of("x", plain, ("vqa", "anls", "multiple-choice")) == {"anls": 1.0}
    assert scores_of("x", Expected(references=("x",) * 10), ("vqa",)) == {"vqa": 1.0}


# -- intervals -------------------------------------------------------------------------------------


def test_wilson_intervals_of_published_examples() -> None:
    # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E,
    # table I, method 3.
    for right, number, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, number) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1


def test_bootstrap_intervals_are_about_those_of_normal_means() -> None:
    scores = [0.0, 0.3, 0.6, 0.9, 1.0] * 40
    low, high = bootstrap(scores)
    half = 1.96 * statistics.pstdev(scores) / math.sqrt(len(scores))
    assert (low, high) == pytest.approx((0.56 - half, 0.56 + half), abs=0.01)
    assert bootstrap(scores) == (low, high)


def test_results_are_by_task_in_order_of_appearance() -> None:
    tally = Tally()
    for task, score in (("b", 1.0), ("a", 0.0), (None, 1.0), ("b", 0.0)):
        tally.add(task, {"exact-match": score, "anls": score / 2})
    found = [(r.metric, r.task, r.samples, r.score) for r in tally.results()]
    assert found == [
        ("exact-match", None, 4, 0.5), ("exact-match", "b", 2, 0.5), ("exact-match", "a", 1, 0.0),
        ("anls", None, 4, 0.25), ("anls", "b", 2, 0.25), ("anls", "a", 1, 0.0),
    ]  # fmt: skip
    assert (tally.results()[0].low, tally.results()[0].high) == wilson(2, 4)
