"""What cleaning takes off and keeps, and where a word stands."""

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kmebench.data.texts import clean, shown, word_places
from tests.data.strategies import texts


@settings(deadline=None)
@given(texts)
def test_cleaning_changes_form_and_ends_only(text):
    cleaned = clean(text, "it")
    assert clean(cleaned, "it") == cleaned
    assert cleaned == cleaned.strip()
    assert unicodedata.is_normalized("NFC", cleaned)
    assert cleaned in unicodedata.normalize("NFC", text)
    assert clean(f" \u200b{unicodedata.normalize('NFD', text)}\n", "it") == cleaned


@settings(deadline=None)
@given(st.text(st.characters()))
@example("\ud83d\ude00")
def test_any_text_is_cleaned_or_refused_in_one_line_by_its_name(text):
    try:
        cleaned = clean(text, "the field")
    except ValueError as error:
        assert str(error).startswith("the field ")  # noqa: PT017 - most texts are fine
        str(error).encode()
        return
    assert cleaned.encode()
    assert any(character.isprintable() or character == "\n" for character in cleaned)


PLACES = [
    ("Ra", "What is the Radiant symbol of Ra?", [30]),
    ("Ra", "radiant Radiant eRa", []),
    ("Ada", "In Canada Ada's book, (Ada) and \u201cAda\u201d", [10, 23, 33]),
    ("Duran", "Duran Duran", [0, 6]),
    ("A A", "A A A", [0, 2]),
    ("Ada", "Ada_1 Ada2 2Ada", []),
    ("Zo", "Zoe\u0308", []),
    ("Zoe", "Zoe\u0308 Zoe", [5]),
    ("\u041d\u043e\u0440", "\u041d\u043e\u0440\u0430 \u041d\u043e\u0440", [5]),
    ("5", "3.5 1,500 5", [10]),
    ("3.5", "13.5 3.5. 3.51", [5]),
    ("C++", "C+++ C++, C", [0, 5]),
    ("C", "C++ C# C", [7]),
    ("C#", "C# C##", [0, 3]),
    ("5", "#5 +5", [1, 4]),
    ("{}", "An empty {} is", [9]),
    ("\u6771\u4eac", "\u6771\u4eac\u306f", [0]),  # Tokyo, with a particle
    ("\u9752\u5c71\u6e56", "\u5728\u9752\u5c71\u6e56\u6240", [1]),
    ("Ada", "\u306fAda\u306f", [1]),
    ("\uccad\uc0b0", "\uccad\uc0b0\uc740", [0]),  # Korean, with a particle
    ("\u0e01", "\u0e01\u0e34 \u0e01", [3]),  # Thai: a vowel sign belongs to its letter
    ("\u0928\u094b\u0930", "\u0928\u094b\u0930\u093e \u0928\u094b\u0930", [5]),
    ("\U0001f98a", "\U0001f98aTavern", [0]),
    ("\U0001f44d", "\U0001f44d\U0001f3fd \U0001f44d", [3]),  # another colour
    ("\U0001f468", "\U0001f468\u200d\U0001f469", []),  # a couple is no man
    ("Ada", "\u2764\ufe0fAda", [2]),
]


@pytest.mark.parametrize(("word", "text", "places"), PLACES)
def test_a_word_stands_where_no_other_letter_touches_it(word, text, places):
    assert word_places(text, word) == places


letters = st.text(st.sampled_from("aA\u00e9\u0436\u0930\u094b1"), min_size=1).filter(
    lambda word: unicodedata.category(word[0])[0] != "M"
)
gaps = st.text(st.sampled_from(" ;'()-\n"), min_size=1)


@settings(deadline=None)
@given(st.lists(letters, min_size=1), gaps, st.data())
def test_among_words_with_gaps_a_word_stands_where_it_is_one_of_them(words, gap, data):
    word = data.draw(st.sampled_from(words) | letters)
    text, expected = "", []
    for each in words:
        if each == word:
            expected.append(len(text))
        text += each + gap
    assert word_places(text, word) == expected


def test_what_is_shown_has_an_end_and_no_line_break():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10_000)) < 200
    assert shown("\u0410", ascii) == r"'\u0410'"
