"""The process group of a job that accelerate's launcher started, for code that needs no Accelerator."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState

from rec.runtime.ranks import left_together, lost_contact_is_named, timeout


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks of this job, if there are any (gloo on CPU, NCCL on GPU), and leave with them.

    Raises:
        LostContact: if one of them is gone.
    """
    several, on_gpu = int(os.environ.get("WORLD_SIZE", "1")) > 1, torch.cuda.is_available()
    group: dict[str, Any] = {"timeout": timeout()} if several else {}
    # Named on CPU, or several processes would each believe that they are alone; one alone refuses a name.
    if several and not on_gpu:
        group["backend"] = "gloo"
    with lost_contact_is_named():
        PartialState(cpu=not on_gpu, **group)
        with left_together():
            yield
