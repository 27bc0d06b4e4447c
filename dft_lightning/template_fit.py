"""Where the texts of a chat stand in what the template made of it."""

from __future__ import annotations

from typing import TypeAlias

from dft_lightning.chats import UnusableRow

REWRITES = "the chat template rewrites a message"

Parts: TypeAlias = list[tuple[str, str]]  # (role, text), the role "" for what the template writes itself


def fitted(rendered: str, literals: list[str], contents: list[tuple[str, str]]) -> Parts:
    """Literals and contents as they stand in the rendering: a template may trim a text, but not change it otherwise."""
    parts, at = [("", literals[0])], len(literals[0])
    for index, ((role, text), following) in enumerate(zip(contents, literals[1:], strict=True)):
        shapes = (text, text.strip(), text.lstrip("\n"), text.lstrip(), text.rstrip())
        shape = next((shape for shape in shapes if rendered.startswith(shape + following, at)), None)
        if shape is None:  # where the text is there, and then a part of what follows, the next one is rewritten
            begun = any(rendered.startswith(shape + following[:1], at) for shape in shapes)
            changed = min(index + begun, len(contents) - 1)
            place = "the last one" if changed == len(contents) - 1 else "an earlier one"
            raise UnusableRow(REWRITES, f"{place}, of the {contents[changed][0]}")
        parts += [(role, shape), ("", following)]
        at += len(shape + following)
    if "".join(text for _, text in parts) != rendered:
        raise UnusableRow(REWRITES, "what follows the last one")
    return parts
