"""The `wild` protocol's answers as text: where one ends, and whether it is the target's.

Nothing here knows a model. Two texts are the same answer if :func:`normalise` makes them equal.
That sets aside case, width, Unicode composition, the kind of digits, blanks, a leading English
article, quotes, brackets, hyphens and the marks of a sentence. It keeps what tells answers
apart: signs, points and commas inside numbers, vowel signs and accents, superscripts, `#`, `%`,
`&`, `@` at a word, currencies, other symbols and emoji.
"""

import re
import unicodedata

#: A sentence ends before one of these: always, or where a new sentence (no small letter) follows.
_STOP = re.compile(r"[\n\r。！？｡।॥؟۔։።]|[.!?](?=[\"'”’»)\]*]*(?:\s+\S|\s*$))")
#: Text before a point that ends no sentence: an initial, or a word without a vowel (St, Mrs).
_ABBREVIATION = re.compile(r"(?:^|[\W\d_])(?:[^\W\d_]|[B-DF-HJ-NP-TV-XZ][b-df-hj-np-tv-xz]{1,3})$")
_SMALL_LETTER_NEXT = re.compile(r"\W*[^\W\d_]")

#: Characters that are not seen: soft hyphen, zero-width blank, directions, variants; and marks
#: of trade and the Arabic stretch, which say nothing.
_UNSEEN = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufe0e\ufe0f\ufeff©®™℠ـ]")
#: All but superscripts, fractions and numbers in circles, which NFKC turns into plain digits.
_PLAIN = re.compile("[^²³¹\u2070-\u207f¼-¾\u2150-\u215f↉\u2460-\u24ff]+")
#: The blank between a number and its unit: "5 %", "$ 5".
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=[%‰°$€£¥₩₹₽](?![\da-z.]))")
_AFTER_UNIT = re.compile(r"(?:(?<=^[$€£¥₩₹₽])|(?<= [$€£¥₩₹₽])) (?=\d)")
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u2668\u2670-\u27bf]")
#: Marks that have a class of their own in a shape (see :func:`_shape`).
_MARKS = {c: c for c in "-*_"} | dict.fromkeys(".,:/٫٬", ".") | dict.fromkeys("#%&@‰", "#")
_MARKS |= {"\u200c": "j", "\u200d": "j"}
#: What a word is made of, as a shape.
_WORD = re.compile(
    r"""e(?:j?e)*                               # emoji
      | (?:[wcjds\#]                            # letters, digits, symbols: "c#", "at&t", "$5"
      | (?<=d)\.(?=d) | (?<![wd])\.(?=d)        # inside a number, or before its digits: "3.5", ".5"
      | (?<=[wcd])_(?=[wcd])
      | (?<![wd])-(?=s*\.?d|s)                  # a sign, not a hyphen: "-5"
      | (?:(?<=(?<![wd*])w)|(?<=(?<![wd*])ww))[-*](?![wd*])  # "O-", "A*"
      )+""",
    re.VERBOSE,
)
_ARTICLES = {"a", "an", "the"}
#: Articles before something else.
_LEADING_ARTICLES = re.compile(r"^(?:(?:a|an|the) )+(?!(?:a|an|the)(?: |$))(?=.)")
#: What is said before an answer: the prompt's own "A:", and sentences that only announce it.
_MARKER = re.compile(r"^(?:\W*a:(?:\s+|$))+")
_LEAD_IN = re.compile(
    r"^(?:(?:(?:correct )?answer(?: is)?|it is|it was|it s"
    r"|la réponse est|la respuesta es|a resposta é|die antwort (?:ist|lautet)|ответ|उत्तर(?: है)?"
    r"|الجواب هو|الإجابة هي|정답은|답은) |(?:答案是|答えは|คําตอบคือ) ?)(?=.)"
)
#: Where a clause may end, for a target that is an article: "A, of course", "A is a letter". What
#: is not in the Latin script has no article.
_CLAUSE_END = re.compile(
    rf"[,;.!?(。、]|\s(?:is|was)\s|[^\W\d_a-z\u00c0-\u024f]|{_EMOJI.pattern}|$"
)

#: What makes a number another one: "3 million", "3 1/2", "3万".
_GREATER = re.compile(
    r" (?:hundred|thousand|million|billion|trillion|percent)(?!\S)"
    r"| \d+/\d| ?[十百千万萬亿億兆십백천만억조]"
)
_HAN = "\u2e80-\u2fdf々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA, _HANGUL = "\u3041-\u30ff\u31f0-\u31ff", "\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff"
_THAI, _LAO, _BURMESE, _KHMER = "\u0e00-\u0e7f", "\u0e80-\u0eff", "\u1000-\u109f", "\u1780-\u17ff"
_JAPANESE = "で|だ|は|が|の|に|と|も|を|へ|や|から|まで|より|など"
#: Scripts that set no blank after a word, and the small words that may follow a name in them.
_FOLLOWERS = {
    _HAN: rf"是|为|為|在|的|和|与|與|及|有|也|了|位于|位於|属于|屬於|{_JAPANESE}",
    _KANA: _JAPANESE,
    _HANGUL: r"(?:은|는|이|가|을|를|의|에|에서|로|으로|와|과|도|(?:이|였|이었)?(?:다|습니다)|입니다"
    r"|예요|이에요)(?!\S)",
    _THAI: "ครับ|ค่ะ|คือ|เป็น|อยู่|ที่|ใน|และ|ของ",
    _LAO: "ແມ່ນ|ເປັນ|ຢູ່|ທີ່|ໃນ|ແລະ",
    _BURMESE: "ဖြစ်|သည်|မှာ|တွင်|၏|နှင့်",
    _KHMER: "គឺ|ជា|នៅ|ក្នុង|និង|ដែល",
}
_SCRIPTS = [(re.compile(f"[{s}]"), re.compile(words)) for s, words in _FOLLOWERS.items()]
_WITHOUT_BLANKS = re.compile(f"[{''.join(_FOLLOWERS)}]")


def natural_stop(text: str, target: str = "") -> str:
    """Cut a generation before its natural stop, leading blanks and line ends left aside.

    A stop that ``target`` holds at the same place ends no answer to it: "St." is the beginning
    of "St. Alban".
    """
    text = text.lstrip()
    end = _end(text, target)
    return text[:end].strip()


def has_stopped(text: str, target: str) -> bool:
    """Whether no further text could move the natural stop of a generation."""
    text = text.lstrip()
    end = _end(text, target)
    return end is not None and (bool(text[end + 1 :].strip()) or text[end] not in ".!?")


def _end(text: str, target: str) -> int | None:
    """Return the place of the natural stop, if there is one."""
    inside = {_said(target[: m.start()]) for m in _STOP.finditer(target)} - {_said(target)}
    for stop in _STOP.finditer(text):
        place = stop.start()
        if text[place] in ".!?":
            after = _SMALL_LETTER_NEXT.match(text, place + 1)
            if after and after[0][-1].islower():
                continue
        if text[place] == "." and _ABBREVIATION.search(text[:place]):
            continue
        if _said(text[:place]) not in inside:
            return place
    return None


def normalise(text: str) -> str:
    """Return the words of a text as the module says, joined by single blanks.

    A text of nothing but marks ("?!") is kept as it is.
    """
    return _without_articles(_words(text))


def begins_with(answer: str, target: str) -> bool:
    """Whether an answer begins with the target, after normalisation and a lead-in, if any.

    Equality would punish "Rome, in Italy"; containment would reward "not Rome". The target must
    end where a word of the answer ends; in scripts without blanks, where a small word follows.
    """
    wanted = normalise(target)
    if wanted and set(wanted.split()) <= _ARTICLES:
        ends = _CLAUSE_END.finditer(_fold(answer))
        return any(_said(_fold(answer)[: end.start()]) == wanted for end in ends)
    return any(
        words.startswith(wanted) and _is_whole(wanted, words[len(wanted) :])
        for words in _readings(answer)
    )


def _readings(text: str) -> list[str]:
    """Normalise a text: as it is, then with one more lead-in taken off each time."""
    readings = [normalise(text)]
    while (rest := _without_articles(_LEAD_IN.sub("", readings[-1]))) != readings[-1]:
        readings.append(rest)
    return readings


def _said(text: str) -> str:
    return _readings(text)[-1]


def _without_articles(words: str) -> str:
    return _LEADING_ARTICLES.sub("", words)


def _is_whole(wanted: str, rest: str) -> bool:
    """Whether an answer's first words are ``wanted`` and no more, given what follows them."""
    if not wanted:
        return False
    if wanted[-1].isdecimal() and _GREATER.match(rest):
        return False
    if not rest or rest[0] == " ":
        return True
    for script, followers in _SCRIPTS:
        if script.match(wanted[-1]):
            return followers.match(rest) is not None
    return _WITHOUT_BLANKS.match(rest) is not None and unicodedata.category(rest[0])[0] == "L"


def _words(text: str) -> str:
    text = re.sub(r"\*{2,}", " ", _MARKER.sub("", _fold(text)))  # ** is for emphasis
    found = " ".join(text[m.start() : m.end()] for m in _WORD.finditer(_shape(text)))
    words = _AFTER_UNIT.sub("", _BEFORE_UNIT.sub("", found)).split(" ")
    return " ".join(word for word in words if word.strip("#%&@‰")) or text.strip()


def _fold(text: str) -> str:
    """Set aside case, width, composition, the kind of digits and what is not seen."""
    text = _UNSEEN.sub("", unicodedata.normalize("NFC", text))
    for _ in range(2):  # folding case may leave characters that NFKC joins
        text = _PLAIN.sub(lambda part: unicodedata.normalize("NFKC", part[0]), text).casefold()
    return "".join(_plain(c) for c in text)


def _plain(char: str) -> str:
    """Make any digit an ASCII one, and any dash or minus a hyphen."""
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    return "-" if char == "\u2212" or unicodedata.category(char) == "Pd" else char


def _shape(text: str) -> str:
    """Return one letter per character: word (c: in a script without blanks), digit, symbol,
    emoji, joiner, a mark, or a blank.
    """
    return "".join(_kind(c) for c in text)


def _kind(char: str) -> str:
    if char in _MARKS:
        return _MARKS[char]
    if _EMOJI.match(char):
        return "e"
    if char.isdecimal():
        return "d"
    category = unicodedata.category(char)
    if category[0] in "LMN" or category in ("Co", "Cn"):
        return "c" if _WITHOUT_BLANKS.match(char) else "w"
    return "s" if category[0] == "S" and char not in "`´" else " "
