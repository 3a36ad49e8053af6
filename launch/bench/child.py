"""A measurement in a process of its own, so that none meets what another left in memory."""

import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence

from launch.supervise import why
from rec.runtime.parent import die_with_parent

TIMEOUT_S = 2 * 3600.0


def last_line(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    cores: Collection[int] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """The last line that ``python ARGUMENT...`` prints. It dies with this process: an orphan would be measured along.

    Args:
        arguments: of the interpreter.
        environment: instead of this process's.
        cores: that it may use; None leaves it all of this process's.
        timeout_s: end it after that many seconds.

    Raises:
        UserError: with its own message, if it called its end a user's mistake.
        RuntimeError: if it fails otherwise, or takes too long.
    """

    def begin() -> None:
        die_with_parent()
        if cores is not None:
            os.sched_setaffinity(0, cores)

    told, command = " ".join(arguments), [sys.executable, *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s, preexec_fn=begin
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"waited {timeout_s:g} s for {told}") from None
    if done.returncode:
        raise RuntimeError(f"{told} failed: {why(done.stderr)}")
    return done.stdout.rstrip().splitlines()[-1]
