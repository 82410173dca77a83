"""The two files of a record, and how they are opened."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sedjax import _journal
from sedjax._dataset import DIMS, DTYPES, FIELDS, VERSION, empty_dataset, needs_io
from sedjax._types import Report

if TYPE_CHECKING:
  import xarray as xr

  from sedjax import _netcdf


def journal_of(path: Path) -> Path:
  """Where what is not in the NetCDF file yet lies: beside the file itself, not beside a link to it."""
  path = path.resolve()
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
      raise ValueError(f"sedjax.record: {path} is not a whole record: it lacks {', '.join(missing)}; make it anew.")
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
  return layout_of(stored) | {"attrs": dict(stored.others.attrs)}


def rows_of(file: Any, contents: _journal.Contents, empty: xr.Dataset) -> Any:
  """The rows of the open journal `file`, shaped as those of a record of no steps."""
  from sedjax import _netcdf

  fields = {name: (np.dtype(DTYPES.get(name, "<f4")), empty[name].shape[1:]) for name in Report._fields}
  return _netcdf.Rows(file, contents, fields)


def open_record(path: str | Path) -> xr.Dataset:
  """Opens a record: a finished one, one that is being written, or what a killed process left.

  Args:
    path: of the file, as `Recorder` was given it.

  Returns:
    A `Dataset` whose fields are read from disk where they are used; see `to_dataset` for its dimensions. Series and
    events are in it as the module says. It shows what was written when it was opened. Close it, or use it in a `with`.
    A deep or pickled copy has all fields in memory.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is no record, is damaged, or was written by a newer version. Also when a field is read that is
      damaged in the file, or in the beginning of a journal longer than 256 MiB, which opening does not read as a whole.

  Warns:
    RuntimeWarning: parts of the journal are damaged; what they recorded is left out.

  Cost: the steps, the series and, while the record is written, the heads of its journal's rows.

  Example:
    >>> import jax.numpy as jnp, sedjax, sedjax.record, tempfile
    >>> state, path = sedjax.track_spectral_edge(3).init({"w": jnp.ones(3)}), tempfile.mkdtemp() + "/run.nc"
    >>> with sedjax.record.Recorder(path) as recorder:
    ...   recorder.append(0, state)
    ...   recorder.flush()
    ...   print(sedjax.record.open_record(path).sizes["step"])
    1
  """
  needs_io()
  path = Path(path)
  check_file(path)
  # The journal first: a writer that finishes in between leaves a file that has the journal's rows already, and joining
  # them again changes nothing.
  journal = journal_of(path)
  check_file(journal)
  with contextlib.ExitStack() as opened:
    try:
      file = opened.enter_context(open(journal, "rb"))
    except FileNotFoundError:
      file = None
    except OSError as error:
      raise cannot("read", journal, error) from error
    try:
      contents = _journal.read(file) if file else None
    except (ValueError, KeyError, TypeError) as error:
      raise cannot("read", journal, error) from error
    if contents is not None:
      check_version(journal, contents.layout["version"])
    _journal.warn_of_damage(journal, contents)
    stored = open_file(path) if path.exists() else None
    if stored is not None:
      opened.callback(stored.file.close)
    if contents is None and stored is None:
      missing = f"there is no record {path}" if file is None else f"the record {path} has no rows yet"
      raise FileNotFoundError(f"sedjax.record: {missing}.")
    from sedjax import _netcdf

    contents = contents or _journal.NOTHING
    empty = empty_dataset({**layout_of(stored), "attrs": {}} if stored else contents.layout)
    joined = _netcdf.joined(stored, empty, contents, rows_of(file, contents, empty))
    opened.pop_all()  # closed with the dataset from here on
    joined.set_close(_netcdf.Closing(*(each for each in (file, stored and stored.file) if each is not None)))
    return joined
