"""Files that are either whole or absent: write aside, flush to disk, rename."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rec.runtime.errors import UserError

TEMPORARY_PREFIX = ".tmp-"
LEAST_FREE_BYTES = 2**20


@contextlib.contextmanager
def a_full_disk_is_named(folder: Path) -> Iterator[None]:
    """Libraries that write large files say that one was not written, not why: an OSError says that the disk is full."""
    try:
        yield
    except Exception as error:  # torch raises a RuntimeError, safetensors its own; it goes on as it is, or named
        if not isinstance(error, OSError) and shutil.disk_usage(folder).free < LEAST_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def fsync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_below(folder: Path) -> None:
    """Flush a folder with all that is in it."""
    for path in [*sorted(folder.rglob("*")), folder]:
        fsync(path)


def beside(path: Path) -> Path:
    """Where to write what will be ``path``.

    A random word keeps two writers of one name (a restarted job beside its dying predecessor) apart: on two nodes both
    may have the same process id.
    """
    path = path.absolute()
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` atomically: readers see the old bytes or the new ones, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    fsync(path.parent)


def write_text(path: Path, content: str) -> None:
    """Replace a UTF-8 text file atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically; keys keep their order."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def publish_folder(temporary: Path, final: Path) -> None:
    """Make a finished folder visible under its final name, after everything in it is on disk.

    Raises:
        FileExistsError: if ``final`` exists; published folders are never overwritten.
    """
    if final.exists():
        raise FileExistsError(final)
    fsync_below(temporary)
    temporary.rename(final)
    fsync(final.parent)


def remove_folder(folder: Path, marker: str) -> None:
    """Delete a published folder, its completeness marker first: a kill in between leaves it incomplete, not wrong."""
    (folder / marker).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def require_writable(path: Path) -> None:
    """Raise a UserError if no file could be written at ``path``; makes the folder that it is to be in."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: nothing can be made in {path.parent}")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(folder: Path, hashes: bool) -> dict[str, dict[str, Any]]:
    """``{relative name: {"bytes": size, "sha256": digest}}`` of every file below ``folder``; digests if asked for."""
    described: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            facts = described[str(path.relative_to(folder))] = {"bytes": path.stat().st_size}
            if hashes:
                facts["sha256"] = sha256_file(path)
    return described


def what_differs(folder: Path, described: dict[str, dict[str, Any]]) -> str | None:
    """The first file of ``described`` that is missing or differs on disk, as a phrase; None if all agree."""
    for name, expected in described.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
        if "sha256" in expected and sha256_file(path) != expected["sha256"]:
            return f"{name} does not match its checksum"
    return None


def archive_problem(path: Path) -> str | None:
    """What is wrong inside a file of ``torch.save``, an archive with a checksum for each tensor, which are all read.

    None if nothing is, or if ``path`` is no such file by its name.
    """
    if path.suffix != ".pt":
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # the reader of an archive fails in many ways where its own tables are damaged
        return f"{path.name} cannot be read ({error})"
    return f"{path.name} does not match its checksums" if damaged else None
