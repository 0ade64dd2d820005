"""Numbers of rows that repeat. Knows nothing of what is in the rows.

oneDNN, which multiplies matrices on CPUs, compiles a kernel for every shape that it has not seen: 5 ms where the
product takes 0.7 (1,000 x 576 by 576 x 1536, bfloat16, AMX). Packs and masks have another number of rows each time.
Rounded up, they have few.
"""

from __future__ import annotations

import torch

_MULTIPLE = 128


def repeated_rows(rows: int, device: torch.device) -> int:
    """The number of rows to compute for `rows`: on a CPU the next multiple of 128, elsewhere `rows` itself."""
    return -(-rows // _MULTIPLE) * _MULTIPLE if device.type == "cpu" else rows
