"""The one exception that users are meant to read."""


class UserError(ValueError):
    """Something that the user can put right: a bad value, a missing file, a broken checkpoint.

    The message is one line with the value found, what was expected and what to do. The command line prints it and
    exits with status 2; from Python it is an ordinary ValueError.
    """
