"""The known names that a misspelt name most likely stands for."""

from collections.abc import Iterable
from difflib import SequenceMatcher

#: Of the share of letters in common: what a suggestion has to have, and by how much less than the best one.
_LEAST, _WITHIN = 0.6, 0.06
_MOST = 3


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Known names like `name`, best first: those that it abbreviates, else those that differ in a few letters."""
    names = list(dict.fromkeys(known))
    longer = sorted((each for each in names if name and each.lower().startswith(name.lower())), key=len)
    if longer:
        return longer[:_MOST]
    likeness = {each: SequenceMatcher(None, name.lower(), each.lower()).ratio() for each in names}
    best = max(likeness.values(), default=0.0)
    close = [each for each in names if likeness[each] >= max(_LEAST, best - _WITHIN)]
    within = [each for each in names if each.endswith(f".{name}") or (len(name) > 2 and name.lower() in each.lower())]
    return sorted(close, key=lambda each: -likeness[each])[:_MOST] or within[:_MOST]


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A question to append to a message, such as "; did you mean DFT?"; "" where no known name is like this one.

    Args:
        name: what was given.
        known: what is valid in its place.
        prefix: of each name that is shown, such as "--".
    """
    found = nearest(name, known)
    return f"; did you mean {' or '.join(prefix + each for each in found)}?" if found else ""
