"""Names that people mistype."""

import difflib
from collections.abc import Iterable

#: What people call a thing, where another name is more like it in letters.
_CALLED = {
    **{"gpu": "cuda", "half": "float16"},
    **{"sequential": "consecutive", "sequence": "consecutive", "lifelong": "consecutive"},
}


def near_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like ``name``, in small or capital letters."""
    by_letters = {each.lower(): each for each in known}
    if (meant := _CALLED.get(name.lower())) in by_letters:
        return meant
    near = difflib.get_close_matches(name.lower(), by_letters, n=1)
    return by_letters[near[0]] if near else None


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name was meant, or which ones there are: the end of a sentence."""
    near = near_name(name, known)
    return f"did you mean {near!r}?" if near else f"there are {', '.join(known) or 'none'}."
