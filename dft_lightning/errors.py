"""The error for input that the user has to change, and text made safe to print."""


def printable(text: object) -> str:
    """Text without anything that a terminal obeys, or that turns the direction of writing: that shows as its escape.

    Names of files, columns and models may hold anything.
    """
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(text))


def lines_of(text: str) -> str:
    """A message whose lines may be several, without anything else that a terminal obeys."""
    return "\n".join(printable(line) for line in text.replace("\t", "    ").split("\n"))


class UserError(ValueError):
    """Something the user gave cannot be used: the message names it, what was expected, and what to change.

    `dft` prints it as one line and leaves with exit code 2; every other exception is a fault of ours and keeps its
    traceback. The message is `printable`, since names in it come from data.
    """

    def __init__(self, *message: object) -> None:
        super().__init__(*(printable(part) for part in message))
