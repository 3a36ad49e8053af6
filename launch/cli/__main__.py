"""``python -m launch.cli``: the ``recalign`` command."""

from launch.cli import main

main()
