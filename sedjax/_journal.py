"""The journal of a record that is being written: frames, one after the other, each whole or not there.

A frame is its length and a CRC-32, a byte that says what it is, and its bytes. It is written by one call of the
operating system at the file's end, so that a process that is killed leaves at most one torn frame, the last, which the
check sum tells. Where a frame is damaged, reading goes on with the next whole one, and says so.

A row's frame holds a check sum of all its values and one of each field. So opening a long journal need not read it all:
of rows far from its end just the heads are checked then, and each field when it is read.

A journal begins with a session frame, and every program that continues a record adds one. What earlier sessions
recorded at or after a step that a later session reached again is replaced: rows, series and events where the later
session has a row, and a series also where the later session has values of that series.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sedjax._dataset import VERSION
from sedjax._files import locked, read_bytes

_HEAD = struct.Struct("<IIc")  # length of what follows, CRC-32 of it (of a row: of all but the values), kind
_ROW = struct.Struct("<qIH")  # step, CRC-32 of all values, number of fields; the fields' CRC-32s come next
SESSION, ROW, NOTE = b"S", b"R", b"N"
FORMAT = "sedjax record"
_BEGINNING = SESSION + b'{"format": "%s"' % FORMAT.encode()  # of a journal, from the kind of its first frame on
CHECKED = 2**28  # bytes at the end of a journal whose rows are checked whole when it is opened
_LONGEST = 2**20  # of notes and sessions that are sought after damage, unless there were longer ones before
_MOST_FIELDS = 2**8  # of a row: what claims more is none, and its check sum need not be made
_SEARCHED = 2**24  # bytes at a time, after damage


class Row(NamedTuple):
  """Where in the journal the numbers of a row lie."""

  step: int
  offset: int
  checks: np.ndarray  # uint32[fields]: of each field's bytes


class Contents(NamedTuple):
  """What a journal holds."""

  layout: Mapping[str, Any]  # windows, groups, seeds, sketch_id, version; attrs, the newest of each but for `created`
  rows: list[Row]  # ascending
  series: dict[str, list[tuple[int, Any]]]  # by name: steps, ascending, and values
  events: list[tuple[int, str]]
  replaced: float  # all that an older file has from this step on is replaced
  series_replaced: dict[str, float]  # likewise, by series
  end: int  # where the last whole frame ends
  damaged: int  # bytes before that which belong to no whole frame


NOTHING = Contents({"attrs": {}}, [], {}, [], np.inf, {}, 0, 0)


def frame(kind: bytes, payload: bytes) -> bytes:
  """The bytes of a frame."""
  return _HEAD.pack(len(payload), zlib.crc32(payload, zlib.crc32(kind)), kind) + payload


def row_frame(step: int, fields: Sequence[bytes]) -> bytes:
  """The bytes of a ROW frame."""
  values = b"".join(fields)
  checks = np.asarray([zlib.crc32(field) for field in fields], "<u4").tobytes()
  head = _ROW.pack(step, zlib.crc32(values), len(fields)) + checks
  return _HEAD.pack(len(head) + len(values), zlib.crc32(head, zlib.crc32(ROW)), ROW) + head + values


def note_payload(step: int, note: Mapping[str, Any]) -> bytes:
  """The payload of a NOTE frame: {"event": text} or {"series": {name: number or list}}."""
  return json.dumps({"step": step, **note}).encode()


class Frame(NamedTuple):
  """A frame that was found whole."""

  kind: bytes
  payload: bytes  # of a row: all but the values
  start: int
  end: int


def frames(file: BinaryIO, *, check_all: bool = False) -> Iterator[Frame]:
  """Each whole frame; unless `check_all`, of rows far from the end just the head is known to be whole."""
  fd = file.fileno()
  size, at, longest = os.fstat(fd).st_size, 0, _LONGEST
  while at < size:
    whole = check_all or at >= size - CHECKED
    found = _frame_at(fd, at, size, whole=whole) or _next_frame(fd, at + 1, size, 2 * longest)
    if found is None:
      return
    yield found
    at, longest = found.end, longest if found.kind == ROW else max(longest, found.end - found.start)


def _frame_at(fd: int, at: int, limit: int, *, whole: bool) -> Frame | None:
  """The frame that begins at `at`, if it ends at `limit` at the latest; `whole` checks a row's values, too."""
  start = os.pread(fd, 512, at)  # more than the head of a row
  if len(start) < _HEAD.size:
    return None
  length, check, kind = _HEAD.unpack_from(start)
  first, end, covered = at + _HEAD.size, at + _HEAD.size + length, length
  if end > limit:
    return None
  if kind == ROW:
    if length < _ROW.size:
      return None
    fields = _ROW.unpack_from(start, _HEAD.size)[2]
    if fields > _MOST_FIELDS:
      return None
    covered = _ROW.size + 4 * fields
  if covered > length:
    return None
  known = start[_HEAD.size : _HEAD.size + covered]
  payload = known if len(known) == covered else known + read_bytes(fd, first + len(known), covered - len(known))
  if zlib.crc32(payload, zlib.crc32(kind)) != check:
    return None
  if whole and kind == ROW:
    values = read_bytes(fd, first + covered, length - covered)
    if zlib.crc32(values) != _ROW.unpack_from(payload)[1]:
      return None
  return Frame(kind, payload, at, end)


def _next_frame(fd: int, start: int, size: int, longest: int) -> Frame | None:
  """The first whole frame from `start` on; notes and sessions of at most `longest` bytes.

  Rows may have any length, since their heads, which are short, have check sums of their own.
  """
  kind_at = _HEAD.size - 1
  for first in range(start, size, _SEARCHED):
    data = os.pread(fd, _SEARCHED + kind_at, first)
    for kind in re.finditer(b"[" + SESSION + ROW + NOTE + b"]", data[kind_at:]):
      at = first + kind.start()
      found = _frame_at(fd, at, size if kind.group() == ROW else min(size, at + longest), whole=True)
      if found is not None:
        return found
  return None


def warn_of_damage(path: Path, contents: Contents | None) -> None:
  """Says what of a journal could not be read."""
  if contents is not None and contents.damaged:
    message = f"sedjax.record: {contents.damaged} bytes of {path} are damaged; what they recorded is left out."
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def read(file: BinaryIO, *, check_all: bool = False) -> Contents | None:
  """What a journal holds; None where it does not hold a whole first frame. See `frames` for `check_all`.

  Raises:
    ValueError: the file is no journal.
  """
  layout: dict[str, Any] = {}
  rows: list[tuple[int, Row]] = []
  series: dict[str, list[tuple[int, int, Any]]] = {}
  events: list[tuple[int, int, str]] = []
  lows: list[dict[str | None, float]] = []  # by session: its first step of rows (None) and of each series
  end, damaged, first_row = 0, 0, None
  for kind, payload, start, stop in frames(file, check_all=check_all):
    damaged += start - end
    if not lows and (kind != SESSION or json.loads(payload).get("format") != FORMAT):
      raise ValueError("it does not begin as a sedjax journal does")
    session = len(lows) - 1
    if kind == SESSION:
      new = json.loads(payload)
      same = new.pop("same", False)  # it adds to what the session's first frame says
      first_row = new.pop("first_row", None)  # the step of the row that comes next, which may be damaged
      first = {name: value for name, value in layout.get("attrs", {}).items() if name == "created"}
      layout = new | {"attrs": {**layout.get("attrs", {}), **new["attrs"], **first}}
      if not same or not lows:
        lows.append({})
      if layout["version"] > VERSION:  # the caller refuses it; its frames may be of other kinds
        break
    elif kind == ROW:
      step, _, fields = _ROW.unpack_from(payload)
      if damaged and None in lows[-1] and step <= rows[-1][1].step:  # the session's own frame is lost
        lows.append({})
        session, first_row = session + 1, None
      checks = np.frombuffer(payload, "<u4", fields, _ROW.size)
      rows.append((session, Row(step, start + _HEAD.size + len(payload), checks)))
      lows[-1].setdefault(None, step if first_row is None else first_row)
    else:
      note = json.loads(payload)
      step = note["step"]
      if "event" in note:
        events.append((session, step, note["event"]))
      for name, value in note.get("series", {}).items():
        series.setdefault(name, []).append((session, step, value))
        lows[-1].setdefault(name, step)
    end = stop
  if not lows:
    return None

  def limits(*keys: str | None) -> list[float]:
    """From which step on later sessions replace what an older file has (first), and what each session recorded."""
    found = [np.inf]
    for low in reversed(lows):
      found.append(min([found[-1], *(low[key] for key in keys if key in low)]))
    return found[::-1]

  any_kind, by_name = limits(None), {name: limits(None, name) for name in series}
  return Contents(
    layout,
    [row for session, row in rows if row.step < any_kind[session + 1]],
    {
      name: [(step, value) for session, step, value in items if step < by_name[name][session + 1]]
      for name, items in series.items()
    },
    [(step, text) for session, step, text in events if step < any_kind[session + 1]],
    any_kind[0],
    {name: limit[0] for name, limit in by_name.items()},
    end,
    damaged,
  )


class Journal:
  """A journal opened for writing, by one writer at a time.

  Raises:
    ValueError: another writer has it open, or the file is no journal.
    OSError: it cannot be made or written.
  """

  def __init__(self, path: Path):
    self.path = path
    self._fd = self._open()
    try:
      with open(self._fd, "rb", closefd=False) as file:
        self.found = read(file)
        start = file.read(_HEAD.size - 1 + len(_BEGINNING))[_HEAD.size - 1 :]
        if self.found is None and not _BEGINNING.startswith(start):
          raise ValueError(f"{path} is no journal; move it away")
      warn_of_damage(path, self.found)
      # What follows is a frame torn by a kill. It goes when something is written, not where the record is refused.
      self._torn: int | None = self.found.end if self.found else 0
    except BaseException:
      self.close()
      raise

  def _open(self) -> int:
    try:
      return locked(self.path, lambda: os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666))
    except BlockingIOError:
      raise ValueError("another recorder is writing it") from None

  def write(self, data: bytes) -> None:
    """Appends a frame; where that fails nothing of it stays."""
    if self._torn is not None:
      os.ftruncate(self._fd, self._torn)
      self._torn = None
    written = os.write(self._fd, data)
    if written == len(data):
      return
    try:  # a disk that is full takes a part, and says so when it is asked again
      while written < len(data):
        written += os.write(self._fd, data[written:])
    except OSError:
      with contextlib.suppress(OSError):
        os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
      raise

  def sync(self) -> None:
    """Returns when the disk has all that was written."""
    os.fsync(self._fd)

  def close(self) -> None:
    os.close(self._fd)

  def abandon(self) -> None:
    """Closes it before anything was written; one that was not there before goes."""
    if self.found is None:
      self.path.unlink(missing_ok=True)
    self.close()
