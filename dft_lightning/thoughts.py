"""A chat template's generation prompt may open the thoughts of the answer; the answer then begins behind that."""

import re

from dft_lightning.chats import UnusableRow

_OPENED = re.compile(r"(<(\w+)>)(\s*)\Z")  # a generation prompt that opens the answer's thoughts
_CLOSED = re.compile(r"(<(\w+)>)\s*</\2>\s*\Z")  # one that says that there are none


def thoughts_in(prompt: str) -> str:
    """What a generation prompt writes of the answer's thoughts: "<think>\\n", an empty block of them, or ""."""
    found = _OPENED.search(prompt) or _CLOSED.search(prompt)
    return found[0] if found else ""


def behind(prompt: str, answer: str) -> str:
    """What the model writes of this answer after this prompt: not again the tag that the prompt already opens.

    Raises:
        UnusableRow: the prompt says that there are no thoughts, and the answer has some.
    """
    found = _OPENED.search(prompt) or _CLOSED.search(prompt)
    own = answer.lstrip()
    if not found or not own.startswith(found[1]) or f"</{found[2]}>" not in own:
        return answer
    if not _OPENED.search(prompt):
        detail = f"the prompt ends with {found[0]!r}; see data.template_kwargs"
        raise UnusableRow("an answer with thoughts behind a prompt that says that there are none", detail)
    return own.removeprefix(found[1]).removeprefix(found[3])
