"""Files that an analysis of checkpoints writes: each is replaced in one stroke, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sedjax._files import UNFINISHED, locked, replacing
from sedjax._readers import files_of
from sedjax._record_files import journal_of, open_file
from sedjax._selection import Selection
from sedjax._series import CheckpointError, Entry, Path, about, error_at

if TYPE_CHECKING:
  import xarray as xr

_STATE, _REPORTS = "state.npz", "reports.bin"


class Store:
  """The unfinished analysis beside the record that it will become: its state, and the reports so far.

  Raises:
    CheckpointError: another analysis is writing it, or it cannot be made.
  """

  def __init__(self, out: Path | None, identity: str):
    self.folder = None if out is None else _folder_of(out)
    self._identity = identity
    self._reports = b""  # where there is no folder
    self._lock = None if self.folder is None else self._locked(self.folder)

  @staticmethod
  def _locked(folder: pathlib.Path) -> int:
    def opened() -> int:
      folder.mkdir(parents=True, exist_ok=True)
      return os.open(folder, os.O_RDONLY)

    with writing(folder):
      try:
        return locked(folder, opened)
      except BlockingIOError:
        raise CheckpointError(
          f"sedjax analyze: another analysis works in {folder}; wait for its end, or give the record another name."
        ) from None

  def close(self) -> None:
    """Lets others write; a folder without anything saved goes."""
    if self.folder is not None:
      with contextlib.suppress(OSError):
        self.folder.rmdir()
    if self._lock is not None:
      os.close(self._lock)
      self._lock = None

  def load(self) -> dict[str, np.ndarray] | None:
    """What was saved last by an analysis with the same identity."""
    if self.folder is None or not (self.folder / _STATE).exists():
      return None
    try:
      with np.load(self.folder / _STATE) as file:
        saved = dict(file)
      same = saved.pop("identity").tobytes().decode() == self._identity
      size = int(saved.pop("reported"))
      same = same and (not size or os.path.getsize(self.folder / _REPORTS) >= size)
    except Exception:  # whatever a damaged file raises
      same, saved = False, {}
    if not same:
      print(f"{self.folder} belongs to another analysis, or is damaged: beginning anew", file=sys.stderr)
      self.remove()
      return None
    return saved

  def save(self, arrays: Mapping[str, Any], reports: Sequence[bytes] = (), first: int = 1) -> None:
    """Replaces the state in one stroke; the reports, of one length, are numbered from `first` on, counting from 1."""
    if self.folder is None:
      self._reports += b"".join(reports)
      return
    size = (first - 1) * len(reports[0]) if reports else 0  # of the reports before
    with writing(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
      if reports:
        with open(self.folder / _REPORTS, "ab") as file:
          if file.tell() < size:
            raise CheckpointError(
              f"sedjax analyze: {self.folder} was emptied, perhaps by another analysis of the same checkpoints; run "
              "one at a time."
            )
          file.truncate(size)
          size += file.write(b"".join(reports))
          _flush(file)
      packed = io.BytesIO()
      np.savez(packed, identity=np.frombuffer(self._identity.encode(), np.uint8), reported=size, **arrays)
      with replacing(self.folder / _STATE) as new:
        new.write_bytes(packed.getvalue())

  def reports(self, size: int) -> bytes:
    """The first `size` bytes of reports."""
    if self.folder is None:
      return self._reports[:size]
    return (self.folder / _REPORTS).read_bytes()[:size] if size else b""

  def remove(self) -> None:
    """Removes what this class wrote, and the folder where that leaves it empty."""
    if self.folder is not None:
      with contextlib.suppress(OSError):
        for name in _own_names():
          (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
  """Turns whatever is raised while a path is written into a CheckpointError."""
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:  # HDF5 has exceptions of its own for a full disk
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    raise CheckpointError(
      f"sedjax analyze: {os.fspath(path)} cannot be written ({reason}); what was saved before is kept: "
      "make room or make its folder writable, and run the same command again to go on."
    ) from error


def _flush(file: Any) -> None:
  file.flush()
  os.fsync(file.fileno())


def _folder_of(out: Path) -> pathlib.Path:
  """Where an unfinished analysis lies."""
  return pathlib.Path(f"{os.fspath(out)}.part")


def _own_names() -> tuple[str, ...]:
  """Of the files in that folder."""
  return _STATE, f"{_STATE}{UNFINISHED}", _REPORTS


def check_place(out: Path) -> None:
  """Makes the folder of a record that is to be written.

  Raises:
    CheckpointError: nothing can be written there, or it would take the place of something else.
  """
  text, path, part = os.fspath(out), pathlib.Path(out), _folder_of(out)
  try:
    if not text or text.endswith("/") or path.is_dir():
      raise CheckpointError(
        f"sedjax analyze: the record's file cannot be {text!r}, which is no name or a folder's; name a file, such as "
        f"{os.path.join(text, 'run.nc')}."
      )
    if path.exists() and not path.is_file():
      raise CheckpointError(f"sedjax analyze: {text} is a device or a pipe, not a file; give another name.")
    if part.exists() and (not part.is_dir() or {file.name for file in part.iterdir()} - {*_own_names()}):
      raise CheckpointError(
        f"sedjax analyze: {part}, where the unfinished analysis would lie, is or holds something else; move it away, "
        "or give the record another name."
      )
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.").close()
  except OSError as error:
    raise CheckpointError(
      f"sedjax analyze: {text} cannot be written ({error.strerror}); give another name or make its folder writable."
    ) from error


def replaceable(out: Path, series: list[Entry]) -> xr.Dataset | None:
  """Steps, series, events and attributes of the record that an analysis of this series may replace, if there is one.

  Raises:
    CheckpointError: there is a file that may not be replaced, since something in it could not be computed again.
  """
  path, journal = pathlib.Path(out), journal_of(pathlib.Path(out))
  if journal.exists():
    raise CheckpointError(
      f"sedjax analyze: {path} is being recorded, as {journal} beside it shows; close its Recorder (after a kill, open "
      "it anew and close it) and run the same command again."
    )
  if not path.exists():
    return None
  why = ""
  try:
    stored = open_file(path)
    stored.file.close()
    old = stored.others
  except ValueError:
    old, why = None, "it is no record, a damaged one, or a newer version's"
  if old is not None and "checkpoints" not in old.attrs:
    why = "no analysis of checkpoints made it"
  elif old is not None and old.attrs.get("checkpoints_id") != checkpoints_id(series):
    why = "it begins with another checkpoint"
  elif old is not None and (others := set(old.step.values.tolist()) - {entry.step for entry in series[1:]}):
    why = f"it has the step {min(others)}, which these have not"
  if why:
    raise CheckpointError(
      f"sedjax analyze: {path} exists and is no record of these checkpoints ({why}), so it is not replaced; give "
      "another name, or move it away."
    )
  return old


def write_record(record: xr.Dataset, out: Path, series: list[Entry]) -> bool:
  """Writes the record's file, old or new and never in between.

  What the user added to an older record of the same checkpoints, series, events and attributes, stays. One of more rows
  is not replaced.

  Returns:
    Whether the file was written.
  """
  from sedjax import _netcdf

  path = pathlib.Path(out).resolve()  # a link stays
  old = replaceable(path, series)
  if old is not None:
    if old.sizes["step"] > record.sizes["step"]:
      return False
    names = [name for name in old.variables if str(name).endswith("_step") or f"{name}_step" in old.variables]
    record = record.assign({name: old[name].variable for name in names}).set_coords([x for x in names if x in old.dims])
    # `k_max` alone of what an analysis writes is there only where it was given.
    record.attrs = {name: value for name, value in old.attrs.items() if name != "k_max"} | record.attrs
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    _netcdf.check_room(path, record.nbytes)
    with replacing(path) as new:
      _netcdf.write_new(new, record)
  return True


def identity_of(series: list[Entry], selection: Selection, all_files: bool) -> str:
  """What two analyses have to share for one to go on where the other ended; exact ones the files, too."""
  config = selection.config
  facts = {
    "state": 2,  # what is saved; other versions are begun anew
    "windows": config.windows,
    "every": config.every,
    "k_max": config.k_max,
    "momentum": config.momentum,
    "sketch": config.sketch.sketch_id,
    "groups": selection.groups,
    "rename": selection.rename,
    "leaves": [(leaf.path, leaf.shape, str(leaf.dtype), leaf.axes, leaf.label) for leaf in selection.leaves],
    "series": [signature_of(entry) for entry in series] if all_files else None,
  }
  return json.dumps(facts)


def signature_of(entry: Entry) -> list[Any]:
  """What tells whether a checkpoint is still the one that was read."""
  return [os.path.abspath(entry.file), entry.step, _digest(entry)]


def check_unchanged(entry: Entry, signature: list[Any]) -> None:
  """Refuses a checkpoint that is no longer what it was before it was read."""
  if signature_of(entry) != signature:
    raise error_at(entry, None, "it was changed while it was read; run it again when it is whole")


def checkpoints_id(series: list[Entry]) -> str:
  """What tells a series from another one, whatever later checkpoints it has; it stays where they are moved."""
  return _digest(series[0])


def _digest(entry: Entry) -> str:
  """Of names, sizes and times of all the files that a checkpoint consists of: to read them would take as long again."""
  path, digest = pathlib.Path(entry.file), hashlib.blake2b(digest_size=16)
  with about(entry):
    for file in files_of(path):
      found = os.stat(file)
      text = f"{os.path.relpath(file, path.parent)}\0{found.st_size}\0{found.st_mtime_ns}\0"
      digest.update(os.fsencode(text))
  return digest.hexdigest()
