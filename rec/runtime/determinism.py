"""The same bits from a GPU every time, for those who ask."""

import os

ASKED = "RECALIGN_DETERMINISTIC"


def be_deterministic_if_asked() -> None:
    """With ``RECALIGN_DETERMINISTIC=1`` in the environment, use GPU kernels that add up in the same order every time.

    On a CPU what recalign computes has one order anyway. Call it before anything is computed. An operation that has no
    such kernel raises a RuntimeError that names it.
    """
    if os.environ.get(ASKED) == "1":
        import torch  # seconds, which --help need not wait for

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
