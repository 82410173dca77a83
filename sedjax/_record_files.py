"""The two files of a record, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sedjax import _journal
from sedjax._dataset import DIMS, DTYPES, FIELDS, VERSION
from sedjax._types import Report

if TYPE_CHECKING:
  import xarray as xr

  from sedjax import _netcdf


def journal_of(path: Path) -> Path:
  """Where what is not in the NetCDF file yet lies."""
  return path.with_name(path.name + ".journal")


def cannot(do: str, path: Path, error: BaseException) -> ValueError:
  """What is raised where a file cannot be read or written, with the reason in one sentence."""
  why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
  return ValueError(f"sedjax.record: cannot {do} {path}: {why}.")


def check_version(path: Path, version: int) -> None:
  """Refuses a record that a newer library wrote."""
  if version > VERSION:
    raise ValueError(
      f"sedjax.record: {path} is a record of version {version}, this library reads up to {VERSION}; update sedjax."
    )


def check_file(path: Path) -> None:
  """Refuses what is there and no file: to open a pipe would wait for whoever writes into it."""
  if not path.name or (path.exists() and not path.is_file()):
    kind = "a folder" if path.is_dir() else "a device or a pipe"
    raise ValueError(f"sedjax.record: {path} is {kind}; name the file of a record.")


def open_file(path: Path) -> _netcdf.Stored:
  """Opens the NetCDF file; one that is damaged, no record or newer raises a ValueError."""
  from sedjax import _netcdf

  check_file(path)
  try:
    stored = _netcdf.open_stored(path, FIELDS)
  except Exception as error:  # h5py raises errors of many kinds
    raise cannot("read", path, error) from error
  attrs = stored.others.attrs
  try:
    version = np.asarray(attrs.get("record_version", ""))
    known = version.shape == () and version.dtype.kind in "iu"
    if known:
      check_version(path, int(version))
    if not known or not {*DIMS, "index"} <= set(stored.others.coords):
      raise ValueError(
        f"sedjax.record: {path} is not a record; those are written by sedjax.record.Recorder and by sedjax analyze."
      )
    if missing := [name for name in FIELDS if name not in stored.file]:
      raise ValueError(f"sedjax.record: {path} is not a whole record, it lacks {', '.join(missing)}.")
  except BaseException:
    stored.file.close()
    raise
  return stored


def layout_of(stored: _netcdf.Stored) -> dict[str, Any]:
  """What a journal that continues the file begins with, but for the attributes."""
  found = stored.others
  names = {f"{name}s": found[name].values.tolist() for name in ("window", "group", "seed")}
  sketch_id = np.asarray(found.attrs["sketch_id"]).tolist() if "sketch_id" in found.attrs else None
  return {"format": _journal.FORMAT, "version": VERSION, **names, "sketch_id": sketch_id}


def existing_layout(path: Path, contents: _journal.Contents | None) -> dict[str, Any] | None:
  """That of a record which is to be continued, from its journal or its file; None where there is none."""
  if contents is not None:
    check_version(path, contents.layout["version"])
    return dict(contents.layout)
  if not path.exists():
    return None
  stored = open_file(path)
  stored.file.close()
  return layout_of(stored)


def rows_of(file: Any, contents: _journal.Contents, empty: xr.Dataset) -> Any:
  """The rows of the open journal `file`, shaped as those of a record of no steps."""
  from sedjax import _netcdf

  fields = {name: (np.dtype(DTYPES.get(name, "<f4")), empty[name].shape[1:]) for name in Report._fields}
  return _netcdf.Rows(file, contents, fields)
