"""The one exception a user is meant to read: a sentence with the value found, the place and the remedy."""


class UserError(Exception):
    """Wrong input. The command line prints the message alone and exits with status 1."""


def first_line(error: BaseException) -> str:
    """What another library says of its failure, short enough for a sentence of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]
