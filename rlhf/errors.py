"""The one exception a user is meant to read: a sentence with the value found, the place and the remedy."""


class UserError(Exception):
    """Wrong input. The command line prints the message alone and exits with status 1."""
