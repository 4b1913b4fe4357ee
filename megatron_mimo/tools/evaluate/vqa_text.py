"""Texts of answers as the evaluation of VQA compares them.

https://visualqa.org/evaluation.html: lower case, no periods except in decimals, number words as
digits, no articles, apostrophes in contractions, spaces for other punctuation.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = dict(
    zip("zero one two three four five six seven eight nine ten".split(), "0123456789", strict=False)
) | {"none": "0", "ten": "10"}
_ARTICLES = ("a", "an", "the")
_THOUSANDS = re.compile(r"\d,+\d")
# As the evaluation has it: a period in front of a digit stays, whatever stands before it.
_PERIOD = re.compile(r"\.(?!\d)")

# Each is found without one of its apostrophes, or without its only one.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _without_one(word: str) -> list[str]:
    """The spellings of a contraction with one apostrophe missing."""
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


_SPELLED = {found: word for word in _CONTRACTIONS for found in _without_one(word)}
# Its table has this one the other way round.
_SPELLED["somebody'd"] = "somebodyd"


def normalise_vqa(text: str) -> str:
    """An answer as VQA compares it, such as "2 dogs" for "Two dogs."."""
    stripped = text.replace("\n", " ").replace("\t", " ").strip()
    found = stripped
    joins = _THOUSANDS.search(stripped) is not None
    for mark in _PUNCTUATION:
        # Beside a space it goes without leaving one.
        apart = f"{mark} " in stripped or f" {mark}" in stripped or joins
        found = found.replace(mark, "" if apart else " ")
    words = _PERIOD.sub("", found).lower().split()
    digits = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_SPELLED.get(word, word) for word in digits if word not in _ARTICLES)
