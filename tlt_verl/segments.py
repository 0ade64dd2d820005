"""Segments of requests in shared memory: a ring of slots in a file, one writer, any number of readers that may die.

Knows a segment's fields and the ring's layout. Knows neither who taps hidden states nor who trains on them.

The file: a page with the header (magic, layout version, shape, count of records), then the slots. Record n goes to slot
n % slots. A slot is a seqlock: its sequence number is 2n + 1 while record n is being written and 2n + 2 once it is
whole, which tells an unfinished slot, and the lap of the ring that it holds. A reader copies a slot between two looks
at the number and keeps the copy only if both say 2n + 2.

Memory ordering: the interpreter does not reorder loads and stores. Under x86's total store order the processor does not
show it either (string and non-temporal copies are ordered with the stores around them), and the two looks suffice. On
weaker machines (Arm) they do not, so a record also has a checksum, without which it is not returned: the CRC-32 of all
but the hidden states and of their sum as 64-bit words. The sum does not see an exchange of words, but that is no way
for a copy to tear; it takes 2 µs for 64 tokens of width 576 (74 KB), on the engine's thread, where a CRC-32 of the same
bytes takes 13 µs with a vectorised zlib and about 70 with a stock one.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import mmap
import os
import secrets
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

LAYOUT_VERSION = 1
REQUEST_ID_BYTES = 64
SHM = Path("/dev/shm")

_MAGIC = b"TLT RING"
_HEADER = struct.Struct("=8sIIII")  # magic, layout version, hidden_width, slots, slot_tokens
_HEADER_BYTES = mmap.PAGESIZE
_COUNT_OFFSET = 64  # of the count of whole records, on a cache line of its own
# Record number, policy version, prompt id, start, prompt length, tokens, final, bytes of the request id, request id.
_FIELDS = struct.Struct(f"=QqQqqIBB2x{REQUEST_ID_BYTES}s")
_TENSORS = (("tokens", torch.int32, 1), ("hidden", torch.bfloat16, 2), ("logprobs", torch.float16, 1))
_UNNAMED = ".new"  # the end of a ring's name until its writer holds the lock


@dataclass(frozen=True, eq=False)
class Segment:
    """One contiguous stretch of one request, T tokens long, with the hidden states of its positions.

    Attributes:
        policy_version: of the policy that computed the hidden states.
        request_id: at most 64 bytes of UTF-8.
        prompt_id: unsigned 64 bits; the siblings of one GRPO group share it.
        start: the position of tokens[0] in prompt + response.
        prompt_len: positions below it are prompt.
        final: nothing follows; the request ended.
        tokens: int32 [T].
        hidden: bfloat16 [T, W]; W is the hidden size times the number of layers tapped.
        logprobs: float16 [T], natural logarithms; NaN where unknown.

    Raises:
        ValueError: a field out of range, or a tensor with another dtype, shape or device (all are on the CPU).
    """

    policy_version: int
    request_id: str
    prompt_id: int
    start: int
    prompt_len: int
    final: bool
    tokens: torch.Tensor
    hidden: torch.Tensor
    logprobs: torch.Tensor

    def __post_init__(self) -> None:
        if len(self.request_id.encode()) > REQUEST_ID_BYTES:
            raise ValueError(f"request_id {self.request_id!r} is longer than {REQUEST_ID_BYTES} bytes of UTF-8")
        if not 0 <= self.prompt_id < 1 << 64:
            raise ValueError(f"prompt_id {self.prompt_id} is not an unsigned 64-bit number")
        for name in ("policy_version", "start", "prompt_len"):
            if not 0 <= getattr(self, name) < 1 << 63:
                raise ValueError(f"{name} {getattr(self, name)} is negative or has more than 63 bits")
        for name, dtype, dims in _TENSORS:
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.dim() != dims or len(tensor) != len(self.tokens) or not tensor.is_cpu:
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, for {len(self.tokens)} tokens"
                raise ValueError(f"a segment's {name} is {got}, not {dtype} on the CPU with {dims} dimension(s)")


def ring_bytes(hidden_width: int, slots: int, slot_tokens: int) -> int:
    """Bytes of shared memory that a ring takes, its header included; ValueError where a number is not positive."""
    shape = _Shape(hidden_width, slots, slot_tokens)
    for name, value in shape._asdict().items():
        if not 0 < value < 1 << 32:
            raise ValueError(f"{name} {value} is not a positive 32-bit number")
    return _HEADER_BYTES + slots * _slot_layout(shape).itemsize


def find_rings(prefix: str = "", folder: Path | str = SHM) -> list[Path]:
    """This user's rings whose name begins with `prefix`, whether their writer lives or not, sorted by path."""
    return _paths(folder, f"tlt-{glob.escape(prefix)}*.ring")


def remove_stale(prefix: str = "", folder: Path | str = SHM) -> list[Path]:
    """Unlink this user's rings whose name begins with `prefix` and whose writer is dead; return their paths.

    Those who have such a ring open keep what it holds. A ring that is being created is left alone, or made anew.
    """
    removed = []
    for path in find_rings(prefix, folder) + _paths(folder, f"tlt-{glob.escape(prefix)}*.ring{_UNNAMED}"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # or another one was faster
            if not _is_locked(file.fileno()):
                path.unlink()  # under our shared lock: its creator, if there is one, waits for it and then looks
                removed.append(path)
    return removed


class SegmentWriter:
    """Writes segments into a new ring; the oldest is overwritten, and nobody is waited for.

    The ring is `folder/tlt-<name>.<random>.ring`, of fixed size, mode 0600, its pages reserved; no two share a path.
    Its writer holds an exclusive flock on it while it lives, and so does a child that it forks without exec. Creation
    removes this user's stale rings in `folder`. Not for several threads at once.

    Args:
        name: becomes part of the file's name; readers find the ring by it.
        hidden_width: W, the width of a segment's hidden states.
        slots, slot_tokens: segments that the ring holds, and tokens of the longest.
        folder: where the ring is; in memory, if it is to be fast.

    Attributes:
        path: the ring's file.
        written: segments written.
        overwritten: those of them that later ones replaced, read or not.
        bytes: bytes of their fields and tensors.

    Raises:
        ValueError: a name with a slash, an empty one, or a number that is not positive.
        OSError: the folder has no room for the ring, or does not exist.
    """

    def __init__(self, name: str, *, hidden_width: int, slots: int, slot_tokens: int, folder: Path | str = SHM) -> None:
        if not name or "/" in name or "\0" in name:
            raise ValueError(f"ring name {name!r} cannot be part of a file's name")
        remove_stale(folder=folder)
        self.path = Path(folder) / f"tlt-{name}.{secrets.token_hex(4)}.ring"
        self.written = self.overwritten = self.bytes = 0
        self._shape = _Shape(hidden_width, slots, slot_tokens)
        self._ring: _Ring | None
        self._fd, self._ring = _create(self.path, self._shape)

    def write(self, segment: Segment) -> None:
        """Copy one segment into the next slot.

        Raises:
            ValueError: more tokens than a slot holds, another width than the ring's, or the writer is closed.
        """
        if self._ring is None:
            raise ValueError(f"the writer of {self.path} is closed")
        ring, (length, width) = self._ring, segment.hidden.shape
        if length > self._shape.slot_tokens:
            raise ValueError(f"a segment of {length} tokens, slot_tokens is {self._shape.slot_tokens}: split it")
        if width != self._shape.hidden_width:
            raise ValueError(
                f"a segment's hidden states have width {width}, hidden_width is {self._shape.hidden_width}"
            )
        number, index = self.written, self.written % self._shape.slots
        fields = _packed(number, segment)
        ring.sequence[index] = 2 * number + 1
        ring.fields[index] = np.frombuffer(fields, np.uint8)
        tokens, logprobs, hidden = parts = ring.parts(index, length)
        np.copyto(tokens, segment.tokens.numpy())
        np.copyto(logprobs, segment.logprobs.detach().view(torch.int16).numpy())
        np.copyto(hidden, segment.hidden.detach().view(torch.int16).numpy())
        ring.checksum[index] = _checksum(fields, *parts)
        ring.sequence[index] = 2 * number + 2
        ring.count[0] = self.written = number + 1
        self.overwritten = max(0, self.written - self._shape.slots)
        self.bytes += len(fields) + length * (4 + 2 + 2 * width)

    def close(self) -> None:
        """Unlink the ring and let go of its lock; whoever has it open keeps it. Closing twice is allowed."""
        if self._ring is not None:
            self._ring = None
            self.path.unlink(missing_ok=True)
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)


class SegmentReader:
    """Reads the segments of one ring, from the oldest that is still there; the writer does not notice.

    Args:
        path: the ring's file, as `find_rings` returns it.

    Attributes:
        read: segments returned.
        lost: segments that were overwritten before they were read, since the reader began.
        torn: segments given up: their writer died while it wrote them, or their checksum is wrong.

    Raises:
        ValueError: the file is not a ring, is truncated, or has another layout version.
        FileNotFoundError: no such file; its writer may have closed it just now.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._shape = _read_shape(self.path, self._fd)
            mapped = mmap.mmap(self._fd, ring_bytes(*self._shape), prot=mmap.PROT_READ)
        except BaseException:
            os.close(self._fd)
            raise
        self._ring: _Ring | None = _Ring(mapped, self._shape)
        self._next = max(0, int(self._ring.count[0]) - self._shape.slots)
        self.read = self.lost = self.torn = 0

    def poll(self, most: int | None = None) -> list[Segment]:
        """The segments that became whole since the last call, in the order written, in tensors of their own.

        Args:
            most: how many at most; None for all there were when the call began.
        """
        if self._ring is None:
            raise ValueError(f"the reader of {self.path} is closed")
        ring, segments = self._ring, list[Segment]()
        end = int(ring.count[0]) + 1  # a writer that was killed may have finished one that it had not counted yet
        while self._next < end and (most is None or len(segments) < most):
            whole, index = 2 * self._next + 2, self._next % self._shape.slots
            sequence = int(ring.sequence[index])
            if sequence == whole:
                segments += self._take(ring, self._next, index)
            elif sequence > whole:
                self._skip(ring)
            elif sequence < whole - 1 or self.writer_alive():
                break  # not begun, or being written
            elif int(ring.sequence[index]) == sequence:  # its writer died; it had not finished it just before
                self.torn, self._next = self.torn + 1, self._next + 1
        self.read += len(segments)
        return segments

    def writer_alive(self) -> bool:
        """Whether the ring's writer lives and has not closed it: after False, one more `poll` returns all there is."""
        return self._ring is not None and _is_locked(self._fd)

    def close(self) -> None:
        """Let go of the ring, and unlink it if its writer is dead. Closing twice is allowed."""
        if self._ring is not None:
            if not self.writer_alive():
                self.path.unlink(missing_ok=True)  # no other ring ever has this path
            self._ring = None
            os.close(self._fd)

    def _take(self, ring: _Ring, number: int, index: int) -> list[Segment]:
        """The record, or nothing where the writer lapped the copying or the checksum is wrong."""
        packed, checksum = ring.fields[index].tobytes(), int(ring.checksum[index])
        fields = _FIELDS.unpack(packed)
        # All of it may be nonsense until the sequence number is looked at again, the number of tokens too.
        parts = [part.copy() for part in ring.parts(index, min(fields[5], self._shape.slot_tokens))]
        if int(ring.sequence[index]) != 2 * number + 2:
            self._skip(ring)
            return []
        self._next += 1
        if fields[0] != number or checksum != _checksum(packed, *parts):
            self.torn += 1
            return []
        return [_segment(fields, *parts)]

    def _skip(self, ring: _Ring) -> None:
        """Go on at the oldest record there is now, and count those in between."""
        oldest = max(self._next + 1, int(ring.count[0]) - self._shape.slots)
        self.lost, self._next = self.lost + oldest - self._next, oldest


class _Shape(NamedTuple):
    """A ring's measures, in the header's order."""

    hidden_width: int
    slots: int
    slot_tokens: int


def _slot_layout(shape: _Shape) -> np.dtype:
    """One slot; the bits of 16-bit floats are int16."""
    S, W = shape.slot_tokens, shape.hidden_width
    head = [("sequence", np.uint64), ("checksum", np.uint64), ("fields", np.uint8, (_FIELDS.size,))]
    parts = [("hidden", np.int16, (S, W)), ("tokens", np.int32, (S,)), ("logprobs", np.int16, (S,))]
    return np.dtype([*head, *parts], align=True)


class _Ring:
    """A mapped file as arrays, one element a slot. The mapping goes when the last array does."""

    def __init__(self, mapped: mmap.mmap, shape: _Shape) -> None:
        slots = np.ndarray((shape.slots,), _slot_layout(shape), mapped, _HEADER_BYTES)
        self.count = np.ndarray((1,), np.uint64, mapped, _COUNT_OFFSET)
        self.sequence, self.checksum, self.fields = slots["sequence"], slots["checksum"], slots["fields"]
        self._tokens, self._logprobs, self._hidden = slots["tokens"], slots["logprobs"], slots["hidden"]

    def parts(self, index: int, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of a slot's tokens int32 [T], log-probs int16 [T] and hidden states int16 [T, W]."""
        return self._tokens[index, :T], self._logprobs[index, :T], self._hidden[index, :T]


def _checksum(fields: bytes, tokens: np.ndarray, logprobs: np.ndarray, hidden: np.ndarray) -> int:
    """32 bits over a record's packed fields and its parts, as `_Ring.parts` gives them."""
    flat = hidden.reshape(-1)
    words = flat.size & ~3  # elements that fill 64-bit words
    rest = (tokens, logprobs, np.add.reduce(flat[:words].view(np.uint64)), flat[words:])
    return zlib.crc32(b"".join([fields, *(part.tobytes() for part in rest)]))


def _packed(number: int, segment: Segment) -> bytes:
    request_id = segment.request_id.encode()
    position = (segment.policy_version, segment.prompt_id, segment.start, segment.prompt_len)
    return _FIELDS.pack(number, *position, len(segment.tokens), segment.final, len(request_id), request_id)


def _segment(fields: tuple, tokens: np.ndarray, logprobs: np.ndarray, hidden: np.ndarray) -> Segment:
    _, policy_version, prompt_id, start, prompt_len, _, final, id_bytes, request_id = fields
    position = (policy_version, request_id[:id_bytes].decode(), prompt_id, start, prompt_len)
    floats = torch.from_numpy(hidden).view(torch.bfloat16), torch.from_numpy(logprobs).view(torch.float16)
    return Segment(*position, bool(final), torch.from_numpy(tokens), *floats)


def _create(path: Path, shape: _Shape) -> tuple[int, _Ring]:
    """A ring that has its name only once it is complete and locked; its file descriptor, which holds the lock."""
    unnamed = path.with_name(path.name + _UNNAMED)
    fd = _open_locked(unnamed)
    try:
        _reserve(fd, shape, path.parent)
        mapped = mmap.mmap(fd, ring_bytes(*shape), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        _HEADER.pack_into(mapped, 0, _MAGIC, LAYOUT_VERSION, *shape)
        unnamed.rename(path)
    except BaseException:
        unnamed.unlink(missing_ok=True)
        os.close(fd)
        raise
    return fd, _Ring(mapped, shape)


def _open_locked(path: Path) -> int:
    """A new file, locked: made again where `remove_stale` came between the two."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)


def _reserve(fd: int, shape: _Shape, folder: Path) -> None:
    """Give the file its size and its pages, so that a full folder is an error here and not a SIGBUS in a write."""
    size = ring_bytes(*shape)
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        wants = f"{shape.slots} slots of {shape.slot_tokens} tokens take {size} bytes, {folder} has {free} free"
        cure = f"take fewer slots (tap.buffer_gb), or give {folder} more room (docker: --shm-size)"
        raise OSError(error.errno, f"{error.strerror}: {wants}: {cure}") from None


def _read_shape(path: Path, fd: int) -> _Shape:
    header = os.pread(fd, _HEADER_BYTES, 0)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise ValueError(f"{path} is not a ring of segments")
    _, version, *numbers = _HEADER.unpack_from(header)
    if version != LAYOUT_VERSION:
        raise ValueError(f"{path} has layout {version}, not {LAYOUT_VERSION}: its writer runs another tlt_verl")
    shape, size = _Shape(*numbers), os.fstat(fd).st_size
    if size != ring_bytes(*shape):
        raise ValueError(f"{path} is truncated: it has {size} bytes, its header says {ring_bytes(*shape)}")
    return shape


def _paths(folder: Path | str, pattern: str) -> list[Path]:
    """This user's plain files of these names, sorted."""
    ours = []
    for path in sorted(Path(folder).glob(pattern)):
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
            if (found := path.lstat()).st_uid == os.geteuid() and stat.S_ISREG(found.st_mode):
                ours.append(path)
    return ours


def _is_locked(fd: int) -> bool:
    """Whether a writer holds the file. If none does, this descriptor has a shared lock: there will be none again."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
