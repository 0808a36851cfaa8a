"""The one kind of error that is the user's to mend: printed as one line, exit code 2."""


class UserError(ValueError):
    """What is wrong, which file or number, what to do: one line, without a traceback."""

    told = False  # another process prints it
