"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Something the user gave cannot be used: the message names it, what was expected, and what to change.

    `dft` prints it as one line and leaves with exit code 2; every other exception is a fault of ours and keeps its
    traceback.
    """
