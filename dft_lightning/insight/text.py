"""What a row says, made fit to be shown: it may hold anything."""


def printable(text: str) -> str:
    """Without anything that a terminal obeys or that turns the direction of writing; that shows as its escape."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
