"""How a job ends early without a bug: by a mistake that the user can correct, or because it was asked to stop."""

import logging
import os

log = logging.getLogger(__name__)


class UserError(Exception):
    """A mistake that the user can correct: shown as one line, without a traceback, exit code 2.

    The message names what is wrong, where (file, row, key), and what to do about it.
    """


class Diverged(UserError):
    """Training came to numbers that are none: its settings are impossible for this data."""


class Stopped(Exception):
    """The job was asked to stop, and has saved what it needs to go on: it ends with exit code 0 and no result."""


class LostContact(Exception):
    """Other processes of the job are gone: shown as one line; the same command, started again, goes on."""


EXIT_USER_ERROR, EXIT_TRY_AGAIN = 2, 75
# Set by --resume-anyway: an environment variable, because every rank of every process of the job has to know it.
RESUME_ANYWAY = "RECALIGN_RESUME_ANYWAY"


def refuse_unless_told(what: str, instead: str) -> None:
    """Refuse to go on with a run that was begun differently, unless the user said --resume-anyway.

    Args:
        what: the difference, as the message's first half.
        instead: what else the user can do.

    Raises:
        UserError: if nobody said so.
    """
    if not os.environ.get(RESUME_ANYWAY):
        raise UserError(f"{what}; {instead}, or go on all the same with --resume-anyway ({RESUME_ANYWAY}=1)")
    log.warning("%s; going on all the same", what)
