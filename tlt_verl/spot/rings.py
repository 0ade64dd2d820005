"""The rings of a job on this node, read one after the other: new ones are found, dead ones are let go.

Knows rings and where they lie; not what is in a segment.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from tlt_verl.segments import SHM, Segment, SegmentReader, find_rings

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0


class Rings:
    """Reads all rings whose name begins with `prefix`.

    Args:
        prefix: what the rings of a job have in common.
        folder: where they are.

    Attributes:
        lost: segments that were overwritten before they were read.
        torn: segments that their writer did not finish.
    """

    def __init__(self, prefix: str, folder: Path = SHM) -> None:
        self._prefix, self._folder = prefix, folder
        self._readers: dict[Path, SegmentReader] = {}
        self._left_out: set[Path] = set()
        self._looked_at = -_LOOK_EVERY_S
        self.lost = self.torn = 0

    def poll(self, most: int) -> list[Segment]:
        """At most `most` new segments, of one ring; none where there are none in any."""
        if time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._look()
        for path, reader in list(self._readers.items()):
            lost, torn = reader.lost, reader.torn
            is_alive = reader.writer_alive()  # before the look: behind it there may be more
            segments = reader.poll(most)
            self.lost += reader.lost - lost
            self.torn += reader.torn - torn
            if segments:
                return segments
            if not is_alive:
                reader.close()
                del self._readers[path]
        return []

    def close(self) -> None:
        """Let go of all rings."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        for path in find_rings(self._prefix, self._folder):
            if path not in self._readers and path not in self._left_out:
                try:
                    self._readers[path] = SegmentReader(path)
                except FileNotFoundError:  # its writer has closed it just now
                    continue
                except ValueError as error:
                    self._left_out.add(path)
                    logger.warning("tlt: a ring is left out: %s", error)
