"""The ``recalign`` command: what it is told, one file a group of commands."""

from launch.cli.entry import main

__all__ = ["main"]
