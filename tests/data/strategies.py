"""Texts as hypothesis draws them, for the tests of data."""

from hypothesis import strategies as st

from kmebench.data.texts import clean


def usable(text: str) -> bool:
    """Say whether a text is one that is not refused."""
    try:
        clean(text, "it")
    except ValueError:
        return False
    return True


characters = st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from(" \n{}\u0301e")
#: Texts that are not refused, with blanks at their ends and unusual characters among them.
texts = st.text(characters, min_size=1, max_size=12).filter(usable)
