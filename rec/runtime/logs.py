"""How a process starts and ends: plain log lines, one clear line on a user's mistake, a traceback on a bug."""

import errno
import logging
import os
import sys
from collections.abc import Callable

from rec.runtime.determinism import be_deterministic_if_asked
from rec.runtime.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR, LostContact, Stopped, UserError
from rec.runtime.memory import keep_freed_memory

log = logging.getLogger(__name__)

EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # as a shell says it
MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
QUIET = ("httpx", "matplotlib", "filelock", "fsspec", "transformers", "torch.distributed")


def set_up_logging(role: str = "") -> None:
    """Log to standard error, a line an event, with the role of this process."""
    prefix = f"[{role}] " if role else ""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S", force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def run_main(main: Callable[[], None], role: str = "", debug: bool = False) -> None:
    """Run a process's entry function; a ``UserError``, or a full or forbidden disk, ends it with one line.

    A job that was asked to stop ends with exit code 0: its launcher would take any other for a failure of one rank, and
    kill the others.
    """
    set_up_logging(role)
    keep_freed_memory()
    be_deterministic_if_asked()
    # Progress bars of libraries would drown our own lines in a log file.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        main()
    except UserError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # whoever read our lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        if debug or error.errno not in MENDABLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {where}{error.strerror}; once that is mended, start the same command again\n")
        sys.exit(EXIT_USER_ERROR)
    except LostContact as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        # Not sys.exit: the libraries would wait for those who are gone once more when they are taken down.
        os._exit(EXIT_TRY_AGAIN)
    except Stopped as stopped:
        log.info("%s", stopped)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)
