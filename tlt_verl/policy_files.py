"""The policy's embedding and head for whoever trains the drafter: written to files, from which they are mapped.

The scheduler is asked for them when it has nothing to do, but a request may arrive at any moment: the copying is a
thread's. Knows tensors and files; what they are used for is others' business.

    <folder>/policy-<version>-<rank>.bin     the rows of the embedding, then those of the head where they are not tied
    <folder>/policy-<version>-<rank>.json    what is in it; written last
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

logger = logging.getLogger(__name__)


class PolicyShare:
    """Writes one rank's share of embedding and head, once for each version of the policy.

    Args:
        folder: where the files go; those of older versions are removed.
        rank: of this process among those that share each tensor.
        version: the policy's version as it is now; a copy during which it changed is thrown away.
        tensors: embedding and head [V / ranks, H] as they are now.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        version: Callable[[], int],
        tensors: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self._folder, self._rank, self._version, self._tensors = folder, rank, version, tensors
        self._thread: threading.Thread | None = None

    def begin(self) -> bool:
        """Begin to write, unless this version is there or being written; always True."""
        if (self._thread is None or not self._thread.is_alive()) and not _paths(
            self._folder, self._version(), self._rank
        )[1].exists():
            self._thread = threading.Thread(target=self._write, name="tlt-policy-share", daemon=True)
            self._thread.start()
        return True

    def _write(self) -> None:
        try:
            self._write_version(self._version())
        except Exception:  # the asker waits with a bound, and finds nothing; the log says why
            logger.exception("tlt: the policy's embedding and head could not be written for the drafter's training")

    def _write_version(self, version: int) -> None:
        data, about = _paths(self._folder, version, self._rank)
        embed, head = self._tensors()
        tied = embed.data_ptr() == head.data_ptr()
        parts = [tensor.detach().cpu().contiguous() for tensor in ((embed,) if tied else (embed, head))]
        size = sum(part.numel() * part.element_size() for part in parts)
        unnamed = data.with_suffix(".new")
        with unnamed.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a SIGBUS in a copy
            mapped, at = np.memmap(file, np.uint8, "r+", shape=(size,)), 0
            for part in parts:
                flat = part.reshape(-1).view(torch.uint8).numpy()
                np.copyto(mapped[at : at + len(flat)], flat)  # without the interpreter's lock
                at += len(flat)
        if self._version() != version:
            unnamed.unlink()
            return
        for old in self._folder.glob(f"policy-*-{self._rank}.*"):
            if old != unnamed:
                old.unlink()
        unnamed.rename(data)
        fields = {"dtype": str(embed.dtype).removeprefix("torch."), "shape": list(embed.shape), "tied": tied}
        text = about.with_suffix(".json.new")
        text.write_text(json.dumps({"version": version, **fields}), encoding="utf-8")
        text.rename(about)


def read_share(folder: Path, version: int, ranks: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Embedding and head [vocab_size, H] as all ranks wrote them, mapped where one rank has all; None if not all have.

    One tensor where they are tied. The mapping stays good when the files are removed.

    Raises:
        ValueError, OSError: a file is damaged.
    """
    shares = []
    for rank in range(ranks):
        data, about = _paths(folder, version, rank)
        if not about.exists():
            return None
        fields = json.loads(about.read_text(encoding="utf-8"))
        rows, H = fields["shape"]
        sides = 1 if fields["tied"] else 2
        try:
            size = sides * rows * H
            flat = torch.from_file(str(data), shared=False, size=size, dtype=getattr(torch, fields["dtype"]))
        except RuntimeError as error:  # torch's word for a file that is gone or too short
            if not data.exists():
                return None  # the next version's writer came between
            raise OSError(f"{data} cannot be read: {error}") from None
        shares.append(flat.view(sides, rows, H))
    whole = shares[0] if ranks == 1 else torch.cat(shares, dim=1)  # rows behind the last token are padding
    return whole[0][:vocab_size], whole[-1][:vocab_size]


def _paths(folder: Path, version: int, rank: int) -> tuple[Path, Path]:
    stem = f"policy-{version}-{rank}"
    return folder / f"{stem}.bin", folder / f"{stem}.json"
