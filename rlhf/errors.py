"""The one exception a user is meant to read: a sentence with the value found, the place and the remedy."""


class UserError(Exception):
    """Wrong input. The command line prints the message alone and exits with status 1."""


def first_line(error: BaseException) -> str:
    """What another library says of its failure, short enough for a sentence of ours."""
    return brief((str(error).splitlines() or [type(error).__name__])[0], 200)


def brief(text: str, most: int = 60) -> str:
    """The text on one line and cut to so many characters, for a sentence that shows what a file holds."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
