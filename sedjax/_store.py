"""Files that an analysis of checkpoints writes: each is replaced in one stroke, or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sedjax._readers import checkpoint_file
from sedjax._selection import Selection
from sedjax._series import CheckpointError, Entry, Path

if TYPE_CHECKING:
  import xarray as xr


class Store:
  """The unfinished analysis beside the record that it will become: its state, and the reports so far."""

  def __init__(self, out: Path | None, identity: str):
    self.folder = None if out is None else pathlib.Path(f"{os.fspath(out)}.part")
    self._identity = identity
    self._reports = b""  # where there is no folder

  def load(self) -> dict[str, np.ndarray] | None:
    """What was saved last by an analysis with the same identity."""
    if self.folder is None or not (self.folder / "state.npz").exists():
      return None
    try:
      with np.load(self.folder / "state.npz") as file:
        saved = dict(file)
      same = saved.pop("identity").tobytes().decode() == self._identity
    except Exception:  # whatever a damaged file raises
      same, saved = False, {}
    if not same:
      print(f"{self.folder} belongs to another analysis, or is damaged: beginning anew", file=sys.stderr)
      shutil.rmtree(self.folder)
      return None
    return saved

  def save(self, arrays: Mapping[str, Any], reports: Sequence[bytes] = (), first: int = 1) -> None:
    """Replaces the state in one stroke; the reports, of one length, are numbers `first` … , counted from 1."""
    if self.folder is None:
      self._reports += b"".join(reports)
      return
    with writing(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
      if reports:
        with open(self.folder / "reports.bin", "ab") as file:
          file.truncate((first - 1) * len(reports[0]))
          file.write(b"".join(reports))
          _flush(file)
      packed = io.BytesIO()
      np.savez(packed, identity=np.frombuffer(self._identity.encode(), np.uint8), **arrays)
      _replace(self.folder / "state.npz", packed.getvalue())

  def reports(self, size: int) -> bytes:
    """The first `size` bytes of reports."""
    if self.folder is None:
      return self._reports[:size]
    return (self.folder / "reports.bin").read_bytes()[:size] if size else b""

  def remove(self) -> None:
    if self.folder is not None:
      shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
  """Turns whatever is raised while a path is written into a CheckpointError."""
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:  # HDF5 has exceptions of its own for a full disk
    reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
    raise CheckpointError(
      f"sedjax analyze: {os.fspath(path)} cannot be written ({reason}); what was saved before is kept: make room and "
      "run the same command again to go on."
    ) from error


def _flush(file: Any) -> None:
  file.flush()
  os.fsync(file.fileno())


def _replace(path: pathlib.Path, content: bytes) -> None:
  new = path.with_name(path.name + ".new")
  try:
    with open(new, "wb") as file:
      file.write(content)
      _flush(file)
    os.replace(new, path)
  finally:
    new.unlink(missing_ok=True)


def write_record(record: xr.Dataset, out: Path) -> None:
  """Writes the record's file, old or new and never in between."""
  from sedjax import _netcdf

  path = pathlib.Path(out)
  new = path.with_name(path.name + ".new")
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      _netcdf.write_new(new, record)
      os.replace(new, path)
    finally:
      new.unlink(missing_ok=True)


def identity_of(series: list[Entry], selection: Selection, all_files: bool) -> str:
  """What two analyses have to share for one to go on where the other ended; exact ones the files, too."""
  config = selection.config
  facts = {
    "windows": config.windows,
    "every": config.every,
    "k_max": config.k_max,
    "momentum": config.momentum,
    "sketch": config.sketch.sketch_id,
    "groups": selection.groups,
    "leaves": [(leaf.path, leaf.shape, str(leaf.dtype), leaf.axes, leaf.label) for leaf in selection.leaves],
    "series": [signature_of(entry) for entry in series] if all_files else None,
  }
  return json.dumps(facts)


def signature_of(entry: Entry) -> list[Any]:
  """What tells whether a checkpoint is still the one that was read."""
  found = os.stat(checkpoint_file(pathlib.Path(entry.file)))
  return [os.path.abspath(entry.file), entry.step, found.st_size, found.st_mtime_ns]
