"""Reading an outbox file page by page, without SQLite: what a damaged b-tree hides is still there.

The format is that of SQLite's documentation, "Database File Format". Nothing is believed here: who calls
checks what comes out. No process may write to the file meanwhile.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from perqueue._outbox.connection import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

Value = None | int | float | str | bytes

_LEAF = 0x0D
_INDEX = (0x02, 0x0A)
_WAL_HEADER = 32
_FRAME_HEADER = 24
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_UTF_8 = ("utf-8", "surrogateescape")
_ENCODINGS = {2: ("utf-16-le", "replace"), 3: ("utf-16-be", "replace")}
"""What an application may have chosen for its file; an outbox's own is in UTF-8."""


class Row(NamedTuple):
    """One row as it is stored; the integer primary key is ``key``, and None among the values."""

    key: int
    values: tuple[Value, ...]
    certain: bool
    """Whether it is part of a page that is in use and well-formed; otherwise it may be an older version."""
    ordered: bool
    """Whether its key fits between those of its neighbours."""
    skipped: int = 0
    """How many keys are passed over between its predecessor on the page and it: only deleting does that."""


class Pages:
    """The pages of a database and its write-ahead log, as the last commit left them."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")
        self._wal: BinaryIO | None = None
        with suppress(FileNotFoundError):
            self._wal = path.with_name(f"{path.name}-wal").open("rb")
        self._size = self._page_size()
        self._frames: dict[int, int] = {}  # page number: offset in the WAL
        self._doubtful: list[tuple[int, int]] = []
        self.unread_frames = 0
        """Frames of the WAL at or behind a damaged one, where SQLite stops to read."""
        if self._wal is not None:
            self._read_wal(self._wal)
        length = -(-self._file.seek(0, 2) // self._size)
        self.count = max([length, *self._frames])
        """How many pages there are."""
        self._encoding = _ENCODINGS.get(int.from_bytes(self._page(1)[56:60]), _UTF_8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._wal is not None:
            self._wal.close()

    def _page_size(self) -> int:
        """Return the page size by either file's header; ours, if neither can be right."""
        candidates = []
        self._file.seek(16)
        candidates.append(self._file.read(2))
        if self._wal is not None:
            self._wal.seek(8)
            candidates.append(self._wal.read(4))
        sizes = [int.from_bytes(candidate) for candidate in candidates]
        sizes[0] = 65536 if sizes[0] == 1 else sizes[0]  # it has but two bytes
        possible = {size for size in sizes if 512 <= size <= 65536 and size & (size - 1) == 0}
        return possible.pop() if len(possible) == 1 else PAGE_SIZE

    # -- the write-ahead log

    def _read_wal(self, wal: BinaryIO) -> None:
        wal.seek(0)
        content = wal.read()
        step = _FRAME_HEADER + self._size
        starts = range(_WAL_HEADER, len(content) - _FRAME_HEADER, step)
        order = ">" if content[:4] == b"\x37\x7f\x06\x83" else "<"
        salt = content[16:24]  # frames of an earlier use of the file have another
        summed = _wal_checksum(order, content[:24].ljust(24, b"\0"), bytes(8))
        if summed != content[24:32] or not any(salt):
            salt = self._salt_of_frames(content, order, starts)
        seed = content[24:32].ljust(8, b"\0")
        transaction: list[tuple[int, int]] = []
        for start in starts:
            header = content[start : start + _FRAME_HEADER]
            body = start + _FRAME_HEADER
            number, commit = struct.unpack(">II", header[:8])
            data = header[:8] + content[body : body + self._size]
            sound = len(data) == 8 + self._size and _wal_checksum(order, data, seed) == header[16:24]
            if not sound and header[8:16] != salt:
                continue
            # Each frame's sum continues its predecessor's as it is stored: one damaged frame spoils itself,
            # and at most the next.
            seed = header[16:24]
            self.unread_frames += not sound or self.unread_frames > 0
            if not sound:
                self._doubtful.append((number, body))
                continue
            transaction.append((number, body))
            if commit:
                self._frames.update(transaction)
                transaction.clear()
        self._doubtful += transaction

    def _salt_of_frames(self, content: bytes, order: str, starts: range) -> bytes:
        """Return the salt of the first frame that continues its predecessor: the header is damaged."""
        for before, start in pairwise(starts):
            header, seed = content[start : start + _FRAME_HEADER], content[before + 16 : before + 24]
            body = content[start + _FRAME_HEADER : start + _FRAME_HEADER + self._size]
            if len(body) == self._size and _wal_checksum(order, header[:8] + body, seed) == header[16:24]:
                return header[8:16]
        return content[starts[0] + 8 : starts[0] + 16] if starts else b""

    # -- pages and rows

    def _page(self, number: int) -> bytes:
        offset = self._frames.get(number)
        if offset is not None and self._wal is not None:
            return self._read_at(self._wal, offset)
        return self._read_at(self._file, (number - 1) * self._size)

    def _read_at(self, file: BinaryIO, offset: int) -> bytes:
        file.seek(offset)
        return file.read(self._size).ljust(self._size, b"\0")

    def _free(self) -> set[int]:
        """Return the pages that hold nothing, as far as the list of them can be read."""
        free: set[int] = set()
        trunk = int.from_bytes(self._page(1)[32:36])
        while 1 < trunk <= self.count and trunk not in free:
            page = self._page(trunk)
            free.add(trunk)
            many = min(int.from_bytes(page[4:8]), self._size // 4 - 2)
            free.update(struct.unpack(f">{many}I", page[8 : 8 + 4 * many]))
            trunk = int.from_bytes(page[:4])
        return free

    def rows(self) -> Iterator[Row]:
        """Yield every row that can be read, of every table, in the order of the pages."""
        free = self._free()
        for number in range(1, self.count + 1):
            if number not in free:
                yield from self._rows_of(self._page(number), 100 if number == 1 else 0)
        for number, page in self._doubtful_pages(free):
            for row in self._rows_of(page, 100 if number == 1 else 0):
                yield row._replace(certain=False)

    def _doubtful_pages(self, free: set[int]) -> Iterator[tuple[int, bytes]]:
        """Yield what a damaged list may call free, and what lies behind a damaged place of the WAL."""
        for number in sorted(free):
            if 1 < number <= self.count:
                yield number, self._page(number)
        assert self._wal is not None or not self._doubtful  # noqa: S101 - for the type checker
        for number, offset in self._doubtful:
            yield number, self._read_at(self._wal, offset)  # type: ignore[arg-type]

    def _rows_of(self, page: bytes, start: int) -> Iterator[Row]:
        cells: list[tuple[int, tuple[Value, ...]]] = []
        slots: list[int] = []  # which of the page's cells each of them is
        whole = page[start] == _LEAF
        if whole:
            many, content = struct.unpack(">HH", page[start + 3 : start + 7])
            many = min(many, (self._size - start - 8) // 2)
            places = struct.unpack(f">{many}H", page[start + 8 : start + 8 + 2 * many])
            for slot, place in enumerate(places):
                cell = self._cell(page, place)
                if cell is None:
                    whole = False
                else:
                    cells.append(cell)
                    slots.append(slot)
            whole = whole and min(places, default=content) == content
        keys = [key for key, _ in cells]
        for place, (key, values) in enumerate(cells):
            ordered = all(low < key for low in keys[max(0, place - 1) : place])
            ordered = ordered and all(key < high for high in keys[place + 1 : place + 2])
            skipped = key - keys[place - 1] - (slots[place] - slots[place - 1]) if place else 0
            yield Row(key, values, certain=True, ordered=ordered, skipped=skipped)
        if not whole and page[start] not in _INDEX and any(page):
            known = set(cells)
            for place in range(start + 8, self._size - 8):
                cell = self._cell(page, place)
                if cell is not None and cell not in known:
                    known.add(cell)
                    yield Row(*cell, certain=False, ordered=True)

    def _cell(self, page: bytes, place: int) -> tuple[int, tuple[Value, ...]] | None:
        """Parse what may be a cell; None if it is none."""
        try:
            length, place = _varint(page, place)
            key, place = _varint(page, place)
            if not 4 <= length <= 100_000 or key < 1 or key >= 2**63:
                return None
            values = _record(self._payload(page, place, length), self._encoding)
        except (IndexError, struct.error):
            return None
        return None if values is None else (key, values)

    def _payload(self, page: bytes, place: int, length: int) -> bytes:
        usable = self._size
        if length <= usable - 35:
            return page[place : place + length]
        least = (usable - 12) * 32 // 255 - 23
        local = least + (length - least) % (usable - 4)
        local = local if local <= usable - 35 else least
        payload = page[place : place + local]
        (overflow,) = struct.unpack(">I", page[place + local : place + local + 4])
        while len(payload) < length and 1 < overflow <= self.count:
            more = self._page(overflow)
            (overflow,) = struct.unpack(">I", more[:4])
            payload += more[4:]
        return payload[:length]


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for _ in range(8):
        byte = data[place]
        place += 1
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, place
    return value << 8 | data[place], place + 1


def _record(payload: bytes, encoding: tuple[str, str]) -> tuple[Value, ...] | None:
    """Parse a record that fills its payload exactly; None if it does not."""
    end, place = _varint(payload, 0)
    left = len(payload) - end
    kinds = []
    while place < end and left >= 0:  # most of what is no record wants more bytes than there are
        kind, place = _varint(payload, place)
        kinds.append(kind)
        left -= _size_of(kind)
    if place != end or left or not kinds:
        return None
    values: list[Value] = []
    for kind in kinds:
        size = _size_of(kind)
        values.append(_value(kind, payload[place : place + size], encoding))
        place += size
    return tuple(values)


def _size_of(kind: int) -> int:
    return (kind - 12) // 2 if kind >= 12 else _INTEGERS.get(kind, 8 if kind == 7 else 0)


def _value(kind: int, raw: bytes, encoding: tuple[str, str]) -> Value:
    if kind in _INTEGERS:
        return int.from_bytes(raw, signed=True)
    if kind in (8, 9):
        return kind - 8
    if kind >= 12:
        return raw.decode(*encoding) if kind % 2 else raw
    return float(struct.unpack(">d", raw)[0]) if kind == 7 else None


def _wal_checksum(order: str, data: bytes, seed: bytes) -> bytes:
    first, second = struct.unpack(">II", seed)
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return struct.pack(">II", first, second)
