"""How a ``recalign`` command is defined: one handler, one line of summary, examples in ``--help``."""

import argparse
import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rec.runtime.errors import UserError


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    handler: Callable[[argparse.Namespace], None],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A new parser below ``commands``; ``handler`` is called with the parsed arguments."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def number(kind: type[int] | type[float], least: float = 0, above: bool = False) -> Callable[[str], int | float]:
    """What argparse calls on a number of at least ``least``, or above it."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (value > least if above else value >= least):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {least}")
        return value

    parse.__name__ = kind.__name__  # "invalid int value"
    return parse


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes that runs a recipe."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    parser.add_argument("--fresh", action="store_true", help="delete the run folder first")
    parser.add_argument(
        "--resume-anyway",
        action="store_true",
        help="go on with a run although its recipe or its data set was another one",
    )


def delete_run(folder: Path) -> None:
    """Delete a run folder that nobody is using; raises what ``replacing`` does."""
    with replacing(folder):
        pass


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """A run folder that nobody is using lies elsewhere meanwhile; at the end it is deleted, after an error put back.

    Raises:
        UserError: if it is none, or in use.
    """
    from rec.runtime.files import TEMPORARY_PREFIX
    from rec.runtime.runfolder import CONFIG, RunFolder, is_run_config

    folder = folder.resolve()  # of a link what it leads to
    if not folder.exists():
        yield
        return
    content = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if not is_run_config(folder / CONFIG) and content - {"slurm"}:  # which a job that never began leaves alone
        raise UserError(f"{folder} is no run folder (no {CONFIG} that a run wrote); not deleting it")
    run, aside = RunFolder(folder), folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    roles = [path.name.removeprefix(".").removesuffix(".lock") for path in folder.glob(".*.lock")]
    with contextlib.ExitStack() as held:
        for role in {"launcher", "trainer", "generator", *roles}:
            held.enter_context(run.lock(role))
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        try:
            yield
        except BaseException:  # an interrupt too: whatever ends it early must not cost the run
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            raise
        shutil.rmtree(aside)
