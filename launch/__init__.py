"""How things start: the ``recalign`` command, the stages of the main job, and what they print."""
