"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake that the user can correct: shown as one line, without a traceback, exit code 2.

    The message names what is wrong, where (file, row, key), and what to do about it.
    """


EXIT_USER_ERROR = 2
