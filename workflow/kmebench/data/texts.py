"""Texts as edit requests hold them: what is taken off, what is refused, what a word is.

A text is in Unicode's form NFC, so that a name is found however its accents were typed, and has
no blanks at its ends. Half a surrogate pair and control characters are refused: no tokenizer
reads them as what the writer meant.
"""

import unicodedata
from collections.abc import Callable
from typing import Any

#: Characters of no width that stand at the ends of copied texts: soft hyphen, zero-width space,
#: direction marks, word joiner, byte order mark.
_WIDTHLESS = "\u00ad\u200b\u200e\u200f\u2060\ufeff"
#: Letters, symbols and marks that are drawn as a blank or not at all.
_UNSEEN = "\u034f\u115f\u1160\u2800\u3164\ufe0e\ufe0f\uffa0"
#: What joins the characters before and behind it into one, whatever they are.
_JOINERS = "\u200c\u200d"
#: Skin colours change the emoji before them, as marks change the letter.
_MODIFIERS = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
#: How the names of characters begin whose scripts write words, or words and their endings,
#: without a blank between them; a variation selector belongs to what is before it.
_UNSPACED = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO",
    "HANGUL", "HALFWIDTH HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE",
    "BALINESE", "TAI ", "NEW TAI LUE", "VARIATION SELECTOR",
)  # fmt: skip
#: How much of a text a message shows.
_SHOWN = 120


def clean(text: Any, name: str) -> str:
    """Return ``text`` in the form NFC, without blanks at its ends.

    Raises:
        ValueError: it is no text, is blank, or holds what no text may; names ``name``.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is no text but a {type(text).__name__}")
    text = _stripped(unicodedata.normalize("NFC", text))
    if odd := next((c for c in text if _refused(c)), None):
        kind = "half a surrogate pair" if "\ud800" <= odd <= "\udfff" else "a control character"
        raise ValueError(f"{name} holds {kind} (U+{ord(odd):04X})")
    if all(unicodedata.category(c)[0] in "ZC" or c in _UNSEEN for c in text):
        raise ValueError(f"{name} is empty")
    return text


def _refused(character: str) -> bool:
    """Say whether no text may hold a character; line breaks and tabs are fine."""
    return unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r"


def _stripped(text: str) -> str:
    """Take blanks and characters of no width off both ends, however they are mixed."""
    while (shorter := text.strip().strip(_WIDTHLESS)) != text:
        text = shorter
    return text


def word_places(text: str, word: str) -> list[int]:
    """Return where ``word`` stands in ``text`` as a whole word, overlapping places too.

    It does not where it touches a letter, digit or mark that belongs to the same word or number,
    or has ``+`` or ``#`` right behind it. Scripts without blanks between words have no such border
    inside: there it stands wherever its characters do.
    """
    places, start = [], text.find(word)
    while start >= 0:
        if not _joined(text, start) and not _joined(text, start + len(word)):
            places.append(start)
        start = text.find(word, start + 1)
    return places


def _joined(text: str, border: int) -> bool:
    """Say whether the characters before and behind ``border`` belong to one word."""
    if not 0 < border < len(text):
        return False
    left, right = text[border - 1], text[border]
    if left.isspace() or right.isspace():
        return False
    if unicodedata.category(right)[0] == "M" or right in _MODIFIERS:
        return True
    if right in "+#" and _in_word(left):  # C++ and C# are other names than C
        return True
    if left in _JOINERS or right in _JOINERS:
        return True
    if _in_number(text, border) or _in_number(text, border - 1):
        return True
    return _in_word(left) and _in_word(right)


def _in_number(text: str, place: int) -> bool:
    """Say whether the decimal or thousands separator of a number stands at ``place``."""
    around = text[max(place - 1, 0) : place + 2]
    return len(around) == 3 and around[1] in ".," and around[0].isdigit() and around[2].isdigit()


def _in_word(character: str) -> bool:
    """Say whether a word goes on beyond this character, in scripts that have blanks."""
    if unicodedata.category(character)[0] not in "LMN" and character != "_":
        return False
    return not unicodedata.name(character, "").startswith(_UNSPACED)


def shown(text: str, quote: Callable[[str], str] = repr) -> str:
    """Quote a text for a message, with escapes for what cannot be seen; long ones are cut."""
    return quote(text) if len(text) <= _SHOWN else f"{quote(text[:_SHOWN])}..."
