"""The one exception for mistakes that a user can mend."""


class LetheError(Exception):
    """A user's mistake, told in one line: what is wrong, where, and how to mend it.

    The commands (train.py, eval.py, python -m ...) print it without a traceback and exit with status 2.
    """
