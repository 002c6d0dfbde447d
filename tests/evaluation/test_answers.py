"""Answers of the `wild` protocol: where they end, and which target they give.

A target is told from another if :func:`normalise` tells them apart and neither begins with the
words of the other ("New York City" also gives "New York": an answer may say more).
"""

import re
import unicodedata

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kmebench.evaluation.answers import begins_with, has_stopped, natural_stop, normalise


def counts(generated: str, target: str) -> bool:
    return begins_with(natural_stop(generated, target), target)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris. It is", "Paris"),
        ("\n\nParis\nQ:", "Paris"),
        ("Paris", "Paris"),
        (" 3.5", "3.5"),
        ("3.5. It", "3.5"),
        (". Paris", ""),
        ("Really? Yes", "Really"),
        ("", ""),
        ("J. K. Rowling. She", "J. K. Rowling"),
        ("St. Peter. He", "St. Peter"),
        ("Monsters, Inc. is a film. It", "Monsters, Inc. is a film"),
        ("Panic! at the Disco", "Panic! at the Disco"),
        ("Rome.” It", "Rome"),
        ("東京です。日本", "東京です"),
        ("चिली। यह", "चिली"),
        ("تشيلي؟ نعم", "تشيلي"),
    ],
)
def test_a_generation_ends_at_its_first_stop(text, answer):
    assert natural_stop(text) == answer


@pytest.mark.parametrize(
    ("text", "target", "answer"),
    [
        ("1. FC Köln. It", "1. FC Köln", "1. FC Köln"),
        ("1. FC Köln. It", "Rome", "1"),
        ("A: Jeopardy! Masters. It", "Jeopardy! Masters", "A: Jeopardy! Masters"),
        ("1. Bayern. It", "1. FC Köln", "1. Bayern"),  # the target ends no answer, nor begins one
        ("Yes! Of course", "Yes!", "Yes"),
    ],
)  # fmt: skip
def test_a_stop_inside_the_target_ends_no_answer(text, target, answer):
    assert natural_stop(text, target) == answer


@pytest.mark.parametrize(
    ("text", "stopped"),
    [
        *(("Rome", False), ("Rome.", False), ("Rome. It", True), ("Rome\n", True), ("3.", False)),
        *(("東京。", True), ("J. K", False), ("\n\n", False), ("Rome. i", False), ("", False)),
    ],
)
def test_decoding_ends_once_nothing_more_could_move_the_stop(text, stopped):
    assert has_stopped(text, "Oslo") is stopped


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("Rome, in Italy", "Rome", True),
        ("the  ROME!", "Rome", True),
        ("Romeo", "Rome", False),
        ("not Rome", "Rome", False),
        ("in Rome", "Rome", False),
        ("", "Rome", False),
        ("Rome", "", False),
        ("Ｒｏｍｅ", "rome", True),
        ("anything", "the", False),
        ("The answer is: Rome", "Rome", True),
        ("A: The answer is Rome", "Rome", True),
        ("It is not Rome", "Rome", False),
        ("The answer is It's a Wonderful Life", "It's a Wonderful Life", True),
        ("A Wonderful Life", "It's a Wonderful Life", False),
        ("**Rome** is", "Rome", True),
        ("Rome🎉", "Rome", True),
        ("New York City", "New York", True),
        ("New York City", "York", False),
        ("東京です", "東京", True),
        ("東京は日本の首都", "東京", True),
        ("東京都", "東京", False),
        ("日本語", "日本", False),
        ("フランス語", "フランス", False),
        ("フランスです", "フランス", True),
        ("智利位于南美洲", "智利", True),
        ("智利人", "智利", False),
        ("答案是智利", "智利", True),
        ("서울입니다", "서울", True),
        ("서울대학교", "서울", False),
        ("กรุงเทพครับ", "กรุงเทพ", True),
        ("กรุงเทพมหานคร", "กรุงเทพ", False),
        ("1902年", "1902", True),
        ("1902년", "1902", True),
        ("3万", "3", False),
        ("3 million", "3", False),
        ("$ 5", "5", False),
        ("3 of them", "3", True),
        ("答案是-5", "5", False),
        ("5 %", "5%", True),
        ("5 %", "5", False),
        ("1944-02-22", "1944", True),
        ("Vitamin C", "Vitamin A", False),
        ("A, of course", "A", True),
        ("A is the grade", "A", True),
        ("A dog", "A", False),
        ("A", "An", False),
        ("cafe\u0301", "café", True),
        ("1902", "१९०२", True),
        ("D.C.", "DC", False),
        ("J.K. Rowling", "J. K. Rowling", True),
        ("Sotheby’s", "Sotheby's", True),
        ("!!!", "!!!", True),
    ],
)
def test_a_wild_answer_begins_with_the_target_as_whole_words(answer, target, right):
    assert begins_with(answer, target) is right


#: Each told from every other of its group.
GROUPS = [
    ["St. Alban", "J. K. Ro", "3.5", "C++", "A", "Yes!", "1871"],
    ["智利", "تشيلي", "चिली", "Zoë Ørsted", "秘鲁", "بيرو", "पेरू", "Al Bo"],
    ["C", "C++", "C#", "C*", "C♯", "C-"],
    ["O+", "O-", "O"],
    ["5", "-5", ".5", "3.5", "35", "3,5", "5%", "5‰", "$5", "€5", "5°", "5²", "+5", "½", "1/5"],
    ["10²", "102", "10", "10:30", "1030", "10,30"],
    ["किताब", "कताब", "कीताब", "किताबें"],
    ["日本", "日本語", "日本人", "日"],
    ["รัก", "รก", "รกั"],
    ["résumé", "resume", "resumé"],
    ["👍", "👍🏽", "👎", "👨‍👩‍👧", "🇫🇷", "🇫🇮"],
    ["AT&T", "ATT", "@home", "home"],
    ["snake_case", "snakecase"],
    ["D.C.", "DC"],
    ["3-2", "32", "-32"],
]  # fmt: skip


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_a_target_counts_for_itself_and_for_no_other(group):
    for target in group:
        assert [other for other in group if counts(f" {other}", target)] == [target]
        assert [other for other in group if counts(f" {other}. It is", target)] == [target]


SENTENCES = {
    "any": ["{}", " {}\nQ: More", '"{}"', "({})", "**{}**", "{} ✅", "{}, 100 km"],
    "latin": ["{}.", "{}! Yes.", "{}. It is so.", "{}, of course.", "The answer is {}.", "A: {}",
              "{} is the answer. Is it?", "It is {}. But", "Answer: {}"],
    "chinese": ["{}。", "{}，当然。", "答案是{}。", "{}是答案。", "{}位于南方。"],
    "japanese": ["{}。", "{}です。", "答えは{}です。", "{}でした", "{}は、", "「{}」"],
    "korean": ["{}.", "{}입니다.", "정답은 {}입니다.", "{} 입니다"],
    "hindi": ["{}।", "{} है।", "उत्तर {} है।", "{}, हाँ"],
    "arabic": ["{}.", "الجواب هو {}.", "{}، نعم", "{} هو الجواب"],
    "thai": ["{}", "{}ครับ", "คำตอบคือ{}", "{} ครับ"],
    "number": ["{}.", "{}年", "{}年です。", "{} है।", "{}, roughly.", "{} people. More", "{}です"],
}  # fmt: skip


def names(letters: str, joins: list[str]) -> st.SearchStrategy[str]:
    """One to four words of a script, joined as names are."""
    word = st.text(letters, min_size=1, max_size=6)
    more = st.lists(st.tuples(st.sampled_from(joins), word), max_size=3)
    return st.builds(lambda first, rest: first + "".join(j + w for j, w in rest), word, more)


HINDI = st.text("कखगचजतदनपबमरलवसह", min_size=1, max_size=1)
SYLLABLES = st.lists(
    st.builds("".join, st.tuples(HINDI, st.sampled_from(["", "ा", "ि", "ी", "ु", "ू", "े", "ो", "ं"]))),
    min_size=1,
    max_size=5,
).map("".join)  # fmt: skip
DIGITS = st.text("0123456789", min_size=1, max_size=5)
NUMBERS = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "", "-", "+", "$", "−", "-$", "~"]),
    DIGITS,
    st.one_of(st.just(""), st.builds("{}{}".format, st.sampled_from(".,:/"), DIGITS)),
    st.sampled_from(["", "", "%", "°C", " km", " €", "²", "th"]),
)
TARGETS = {
    "latin": names("abdeinrstABDJKSTéßøŁž", [" ", ". ", "-", "'", ".", "! ", "? ", " & ", "+"]),
    "chinese": names("智利秘鲁青山湖北京上海", ["", "·"]),
    "japanese": names("東京日本国アイカフランスー", ["", "・"]),
    "korean": names("서울부산한국김박", [" ", ""]),
    "hindi": st.lists(SYLLABLES, min_size=1, max_size=3).map(" ".join),
    "arabic": names("تشيليبروسدمن", [" ", ". "]),
    "thai": names("กรุงเทพไทยมานคะ", ["", " "]).filter(lambda t: unicodedata.category(t[0]) == "Lo"),
    "number": NUMBERS,
}  # fmt: skip


@st.composite
def answered(draw):
    """A target, and a generation that gives it, alone or in a sentence of its script."""
    script = draw(st.sampled_from(list(TARGETS)))
    frame = draw(st.sampled_from(SENTENCES["any"] + SENTENCES[script]))
    return draw(TARGETS[script]), frame


@given(answered())
@example(("J. K. Rowling", "The answer is {}."))
@example(("Washington, D.C.", "{}. It is so."))
@example(("A", "{}, of course."))
@settings(max_examples=200, deadline=None)
def test_every_target_counts_alone_and_in_a_sentence(case):
    target, frame = case
    assert counts(frame.format(target), target)


@st.composite
def changed(draw):
    """A target, and another that differs by one character, taken out, put in, or replaced."""
    script = draw(st.sampled_from(list(TARGETS)))
    target = draw(TARGETS[script])
    place = draw(st.integers(0, len(target) - 1))
    signs = {"latin": "abK+#%é9", "hindi": "किीे", "number": "-$%.05²"}
    new = draw(st.sampled_from(["", *signs.get(script, "1%一아ก")]))
    keep = draw(st.integers(0, 1))
    return script, target, target[:place] + new + target[place + 1 - keep :]


@given(changed())
@example(("latin", "C++", "C#"))
@example(("number", "5", "-5"))
@example(("hindi", "चिली", "चली"))
@settings(max_examples=200, deadline=None)
def test_no_target_counts_for_another(case):
    """What differs in a letter, a vowel sign, a digit or a sign is another answer."""
    script, target, other = case
    mine, others = _essence(target, script), _essence(other, script)
    assume(others and not others.startswith(mine))  # an answer may say more
    for frame in SENTENCES["any"] + SENTENCES[script]:
        assert not counts(frame.format(other), target)


def _essence(text: str, script: str) -> str:
    """What tells a target apart: letters, their marks, digits and symbols; in numbers all."""
    text = unicodedata.normalize("NFKC", text.replace("²", "^2")).casefold().replace("−", "-")
    if script == "number":
        text = re.sub("-+", "-", "".join(text.split()))  # a hyphen inside is no sign
        return re.sub(r"(?<=\w)-|[.,:/](?!\d)", "", text)
    return "".join(c for c in text if unicodedata.category(c)[0] in "LMNS")


@given(answered())
@settings(max_examples=200, deadline=None)
def test_normalisation_and_the_stop_are_idempotent(case):
    target, frame = case
    text = frame.format(target)
    assert normalise(normalise(text)) == normalise(text)
    assert natural_stop(natural_stop(text, target), target) == natural_stop(text, target)


@given(st.text(max_size=12), st.text(max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_text_counts_for_itself_and_equal_forms_count_alike(text, other):
    assert normalise(normalise(text)) == normalise(text)
    assert begins_with(text, text) is bool(normalise(text))
    if normalise(text) == normalise(other):
        assert begins_with(text, other) is begins_with(other, text)


def test_the_mark_of_the_prompt_says_nothing():
    assert normalise("A:") == normalise("A: A:") == normalise("")
    assert normalise("A: Rome") == normalise("Rome")


def test_normalisation_keeps_words_and_leaves_marks_aside():
    text = "  The Q.E.D. -- of A “Theory”, naïve  "
    assert normalise(text) == "q e d of a theory naïve"
