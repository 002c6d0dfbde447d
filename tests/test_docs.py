"""README, docs/*.md and their kin: links lead somewhere, sentences are short."""

import re
from pathlib import Path

import pytest

from kmebench.reporting.quotes import pages, without_quotes

PAGES = [*pages(), Path("CONTRIBUTING.md"), Path("results/README.md")]
GENERATED = Path("docs/editors-values.md")
WORDS = 25


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def sentences(text):
    """The sentences of paragraphs and lists; a quoted number and a piece of code are one word."""
    text = re.sub(r"<!--= (\w+) reference[^>]*-->.*?<!--/-->", "", text, flags=re.DOTALL)
    text = without_quotes(re.sub(r"<!--= [^>]*-->.*?<!--/-->", "9", text, flags=re.DOTALL))
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(\||#|    |!\[).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))
    for paragraph in re.split(r"\n\s*\n|^(?:- |\d+\. )", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.?!])[*)]*\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("page", [p for p in PAGES if p != GENERATED], ids=str)
def test_a_sentence_has_at_most_25_words(page):
    for sentence in sentences(page.read_text(encoding="utf-8")):
        assert len(re.findall(r"[\w’'/+.-]*\w[\w’'/+.-]*", sentence)) <= WORDS, sentence
