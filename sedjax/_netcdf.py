"""A record's two files, seen as one: the NetCDF file that earlier sessions left, and the journal of what came after."""

from __future__ import annotations

import errno
import itertools
import multiprocessing.pool
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5netcdf
import h5py
import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from sedjax._files import read_into, replacing
from sedjax._journal import Contents
from sedjax._types import Report

BLOCK_BYTES = 2**26  # of one variable; what reading and writing keep in memory
LONGEST_CHUNK = 4096  # steps
FAST = {"zlib": True, "complevel": 1, "shuffle": True}
Series = tuple[np.ndarray, np.ndarray]  # int64[n] steps, and values [n] or [n, seed]


class Rows:
  """The rows of a journal, field by field.

  Args:
    file: the journal.
    contents: what it holds.
    fields: dtype and shape of each field, in the order in which they lie in a row.
  """

  def __init__(self, file: BinaryIO, contents: Contents, fields: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
    self.file, self.fields = file, fields
    self.steps = np.asarray([row.step for row in contents.rows], np.int64)
    self._rows = contents.rows
    self._starts: dict[str, int] = {}
    at = 0
    for name, (dtype, shape) in fields.items():
      self._starts[name] = at
      at += dtype.itemsize * int(np.prod(shape))

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, name: str, places: np.ndarray) -> np.ndarray:
    """[places, ...]: a field of some rows.

    Raises:
      ValueError: it is damaged.
    """
    dtype, shape = self.fields[name]
    start, length, number = self._starts[name], dtype.itemsize * int(np.prod(shape)), list(self.fields).index(name)
    found, fd = np.empty((len(places), length), np.uint8), self.file.fileno()
    for data, row in zip(found, map(self._rows.__getitem__, places), strict=True):
      read_into(fd, row.offset + start, data)
      if zlib.crc32(data) != row.checks[number]:  # pyright: ignore[reportArgumentType]
        raise ValueError(
          f"sedjax.record: {name} of step {row.step} in {self.file.name} is damaged; open the record with "
          "sedjax.record.Recorder and close it, which makes the file of all rows but the damaged ones."
        )
    return found.view(dtype).reshape(len(places), *shape)


class _Joined(BackendArray):
  """A field whose first `keep` steps are in the file and the others in the journal; reads what is asked for."""

  def __init__(self, stored: h5py.Dataset | None, keep: int, rows: Rows, name: str):
    self.stored, self.keep, self.rows, self.name = stored, keep, rows, name
    self.dtype, shape = rows.fields[name]
    self.shape = (keep + len(rows), *shape)

  def __getitem__(self, key: Any) -> Any:
    return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._get)

  def __reduce__(self) -> tuple[Any, ...]:
    """What is pickled or deeply copied is in memory."""
    return indexing.NumpyIndexingAdapter, (self._get((slice(None),) * len(self.shape)),)

  def _get(self, key: tuple[Any, ...]) -> np.ndarray:
    at, *others = (np.atleast_1d(np.arange(size)[k]) for size, k in zip(self.shape, key, strict=True))
    boxes = [_box(wanted) for wanted in others]
    slices, inside = [box for box, _ in boxes], [places for _, places in boxes]
    found = np.empty((len(at), *map(len, others)), self.dtype)
    block = at // block_length(self.dtype, self.shape[1:])
    for number in np.unique(block):
      here = np.flatnonzero((block == number) & (at < self.keep))
      if len(here) and self.stored is not None:
        steps, places = _box(at[here])
        try:
          values = self.stored[(steps, *slices)]
        except OSError as error:  # of HDF5, without a name
          why = " ".join(str(error).split())
          raise ValueError(
            f"sedjax.record: {self.name} cannot be read from {self.stored.file.filename}, which is damaged ({why}); "
            "restore it, or make the record anew."
          ) from error
        found[here] = values[np.ix_(places, *inside)]
      here = np.flatnonzero((block == number) & (at >= self.keep))
      if len(here):
        values = self.rows.read(self.name, at[here] - self.keep)
        found[here] = values[(slice(None), *slices)][np.ix_(np.arange(len(here)), *inside)]
    return found[tuple(0 if np.ndim(k) == 0 and not isinstance(k, slice) else slice(None) for k in key)]


def _box(wanted: np.ndarray) -> tuple[slice, np.ndarray]:
  """The slice of an axis that holds all indices, and where in it they are: HDF5 reads lists of indices slowly."""
  if not wanted.size:
    return slice(0, 0), wanted
  gaps = np.diff(wanted)
  step = int(gaps[0]) if len(gaps) and gaps[0] > 0 and np.all(gaps == gaps[0]) else 1
  first = int(wanted.min())
  return slice(first, int(wanted.max()) + 1, step), (wanted - first) // step


def block_length(dtype: np.dtype, shape: tuple[int, ...]) -> int:
  """How many steps of a variable make a block; a power of two."""
  step_bytes = max(1, dtype.itemsize * int(np.prod(shape)))
  return 2 ** min(LONGEST_CHUNK.bit_length() - 1, max(0, (BLOCK_BYTES // step_bytes).bit_length() - 1))


class Stored(NamedTuple):
  """The NetCDF file, opened; `others` are its coordinates, series, events and attributes, in memory."""

  file: h5py.File
  others: xr.Dataset


def open_stored(path: Path, fields: Iterable[str]) -> Stored:
  """Opens a file. xarray would take most of a second to open the rows' fields."""
  file = h5py.File(path, "r")
  try:
    seen = h5netcdf.File(file, "r")
    variables = {}
    for name in [name for name in seen.variables if name not in set(fields)]:
      dataset: Any = file[name]
      variables[name] = (_dims_of(dataset), _text(np.asarray(dataset[...])), dict(seen[name].attrs))
    return Stored(file, xr.Dataset(variables, attrs=dict(seen.attrs)))
  except BaseException:
    file.close()
    raise


def _dims_of(dataset: Any) -> tuple[str, ...]:
  """The dimensions of a variable. h5netcdf would go through all variables for each of them."""
  if dataset.is_scale and dataset.ndim == 1:
    return (dataset.name.removeprefix("/"),)
  if not all(len(dim) for dim in dataset.dims):
    raise ValueError(f"variable {dataset.name.removeprefix('/')!r} has axes without names, and no record has such")
  return tuple(dim[0].name.removeprefix("/") for dim in dataset.dims)


def _text(values: np.ndarray) -> np.ndarray:
  """Text that HDF5 gives as bytes, decoded; other values as they are."""
  if values.dtype != object:
    return values
  return np.asarray([value.decode() if isinstance(value, bytes) else value for value in values], object)


class Parts(NamedTuple):
  """A record made of what is kept of the file, and the journal."""

  keep: int  # steps of the file
  series: dict[str, Series]
  events: list[tuple[int, str]] | None  # None where there never was one
  attrs: dict[str, Any]


def parts_of(old: xr.Dataset, contents: Contents) -> Parts:
  """Joins all but the rows' fields. `old` is the file, or a record of no steps."""
  keep = int(np.searchsorted(old.step.values, contents.replaced))
  series: dict[str, Series] = {}
  names = [str(name) for name in old.data_vars if f"{name}_step" in old.dims and name != "event"]
  for name in dict.fromkeys([*names, *contents.series]):
    steps, values = np.zeros(0, np.int64), None
    if name in old:
      steps, values = old[f"{name}_step"].values, old[name].values
      some = steps < contents.series_replaced.get(name, contents.replaced)
      steps, values = steps[some], values[some]
    new = contents.series.get(name, [])
    if new:
      steps = np.concatenate([steps, np.asarray([step for step, _ in new], np.int64)])
      added = _over_seeds([value for _, value in new])
      values = added if values is None else _appended(values, added)
    series[name] = (steps, np.zeros(0) if values is None else values)  # none are left where a run went back
  events: list[tuple[int, str]] = []
  if "event" in old:
    events = list(zip(old.event_step.values.tolist(), old.event.values.tolist(), strict=True))
    events = [(step, text) for step, text in events if step < contents.replaced]
  # An event that is in both files, where a kill came between writing one and removing the other, is one event.
  events = sorted(dict.fromkeys([*events, *contents.events]), key=lambda event: event[0])
  first = {name: old.attrs[name] for name in ("created",) if name in old.attrs}
  known = "event" in old or contents.events
  return Parts(keep, series, events if known else None, {**old.attrs, **contents.layout["attrs"], **first})


def _over_seeds(values: list[Any]) -> np.ndarray:
  """float64[n], or [n, seed] where there are arrays; a number among them is that of all seeds."""
  seeds = max((len(value) for value in values if isinstance(value, list)), default=0)
  return np.asarray([np.broadcast_to(value, (seeds,)) if seeds else value for value in values], np.float64)


def _appended(old: np.ndarray, new: np.ndarray) -> np.ndarray:
  """One after the other; where either is over seeds, both are."""
  seeds = max((*old.shape[1:], *new.shape[1:]), default=0)
  parts = (x if x.ndim == 2 or not seeds else np.broadcast_to(x[:, None], (len(x), seeds)) for x in (old, new))
  return np.concatenate(list(parts))


def _series_variables(name: str, steps: np.ndarray, values: np.ndarray) -> dict[str, xr.Variable]:
  dims = (f"{name}_step", "seed")[: values.ndim]
  return {
    f"{name}_step": xr.Variable(dims[:1], steps, {"long_name": "optimizer step", "units": "steps"}),
    name: xr.Variable(dims, values, {"long_name": name.replace("_", " ")}),
  }


def _added_variables(parts: Parts) -> dict[str, xr.Variable]:
  """Series and events."""
  added = {}
  for name, (steps, values) in parts.series.items():
    added |= _series_variables(name, steps, values)
  if parts.events is not None:
    steps = np.asarray([step for step, _ in parts.events], np.int64)
    added |= _series_variables("event", steps, np.asarray([text for _, text in parts.events], object))
  return added


class Closing:
  """Closes files when it is called."""

  def __init__(self, *files: Any):
    self._files = files

  def __call__(self) -> None:
    for file in self._files:
      file.close()

  def __reduce__(self) -> tuple[Any, ...]:
    return Closing, ()  # a copy has no files


def joined(stored: Stored | None, empty: xr.Dataset, contents: Contents, rows: Rows) -> xr.Dataset:
  """The record that the file and its journal make; the fields are read where they are used.

  Args:
    stored: the file, or None where there is only a journal.
    empty: a record of no steps, of the same layout.
    contents, rows: the journal's.
  """
  old = empty if stored is None else stored.others
  parts = parts_of(old, contents)
  variables: dict[str, Any] = _added_variables(parts)
  for name in rows.fields:
    values = None if stored is None else stored.file[name]
    assert values is None or isinstance(values, h5py.Dataset)
    lazy = indexing.LazilyIndexedArray(_Joined(values, parts.keep, rows, name))
    variables[name] = xr.Variable(empty[name].dims, lazy, empty[name].attrs)
  steps = np.concatenate([old.step.values[: parts.keep], rows.steps])
  coords = {name: empty[name].variable for name in ("seed", "window", "group", "index")}
  coords["step"] = xr.Variable("step", steps, empty.step.attrs)
  coords |= {name: variables.pop(name) for name in list(variables) if name.endswith("_step")}
  return xr.Dataset(variables, coords, parts.attrs)


def write(path: Path, empty: xr.Dataset, contents: Contents, rows: Rows) -> None:
  """Takes a journal's contents into the NetCDF file, which is old or new, never in between.

  Args:
    path: the file; it may be absent.
    empty: a record of no steps, of the same layout.
    contents, rows: the journal's.
  """
  path = path.resolve()  # a link stays
  row_bytes = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in rows.fields.values())
  check_room(path, len(rows) * row_bytes + (path.stat().st_size if path.exists() else 0))
  with replacing(path) as partial:
    if path.exists():
      stored = open_stored(path, rows.fields)
      parts = parts_of(stored.others, contents)
      datasets: list[Any] = [stored.file[name] for name in ("step", *rows.fields)]
      grows = all(dataset.maxshape[0] is None for dataset in datasets)
      stored.file.close()
      if grows:
        shutil.copyfile(path, partial)
      else:  # as xarray writes a dataset that is told no more
        write_new(partial, xr.load_dataset(path, engine="h5netcdf", decode_times=False).drop_encoding())
    else:
      parts = parts_of(empty, contents)
      write_new(partial, empty)
    with h5py.File(partial, "r+") as file:
      _remove_narrow(file, parts)
    with h5netcdf.File(partial, "r+") as file:
      _extend(file, parts, rows)
    with h5py.File(partial, "r+") as file:
      _write_fields(file, parts.keep, rows)


def check_room(path: Path, size: int) -> None:
  """Refuses to write a file of that many bytes, uncompressed, where the disk may have no room for it.

  HDF5 cannot close a file that a full disk cut off, and takes the process down when it tries at its end.

  Raises:
    OSError: there may be too little room.
  """
  needed, free = size + 2**18, shutil.disk_usage(path.parent).free
  if free < needed:
    raise OSError(errno.ENOSPC, f"no space left on the disk: it may need {needed:,} bytes, {free:,} are free")


def write_new(path: Path, record: xr.Dataset) -> None:
  """Writes a record in memory to a file that can be continued."""
  encoding: dict[str, Any] = {"step": {"chunksizes": (LONGEST_CHUNK,), **FAST}}
  for name in Report._fields:
    dims, shape = record[name].dims[1:], record[name].shape[1:]
    # What one reads is mostly one seed and window over all steps, of vectors one group.
    others = [
      size if dim == "index" or (dim == "group" and "index" not in dims) else 1
      for dim, size in zip(dims, shape, strict=True)
    ]
    chunk = (block_length(record[name].dtype, shape), *others)
    encoding[name] = {"chunksizes": chunk, "_FillValue": None, **FAST}
  growing = ["step", *(str(dim) for dim in record.dims if str(dim).endswith("_step"))]  # the user's series grow, too
  for name, variable in record.variables.items():
    if variable.dims and variable.dims[0] in growing[1:]:
      encoding[str(name)] = {"chunksizes": (LONGEST_CHUNK, *variable.shape[1:]), "_FillValue": None}
  record.to_netcdf(path, engine="h5netcdf", encoding=encoding, unlimited_dims=growing)


def _remove_narrow(file: h5py.File, parts: Parts) -> None:
  """Removes series that were numbers and are over seeds from now on: variables of a file cannot have one more axis."""
  for name, (_, values) in parts.series.items():
    if name in file and file[name].ndim < values.ndim:  # pyright: ignore[reportAttributeAccessIssue]
      file[name].dims[0].detach_scale(file[f"{name}_step"])  # pyright: ignore[reportAttributeAccessIssue]
      del file[name]


def _extend(file: Any, parts: Parts, rows: Rows) -> None:
  """Makes room for the rows, and writes all but their fields."""
  file.resize_dimension("step", parts.keep + len(rows))
  if len(rows):
    file["step"][parts.keep :] = rows.steps
  for name, variable in _added_variables(parts).items():
    text = variable.dtype == object
    if variable.dims[0] not in file.dimensions:
      file.dimensions[variable.dims[0]] = None
    file.resize_dimension(variable.dims[0], variable.shape[0])
    if name not in file.variables:
      dtype = h5py.string_dtype() if text else variable.dtype
      chunks = (LONGEST_CHUNK, *variable.shape[1:])
      file.create_variable(name, variable.dims, dtype, chunks=chunks, compression="gzip", compression_opts=1)
      for key, value in variable.attrs.items():
        file[name].attrs[key] = value
    if variable.shape[0]:
      file[name][...] = variable.values
  for key, value in parts.attrs.items():
    file.attrs[key] = value


def _write_fields(file: h5py.File, keep: int, rows: Rows) -> None:
  """Writes the rows after the first `keep` steps. h5netcdf would take longer to check flags than all else takes."""
  total = keep + len(rows)
  # A pool of concurrent.futures starts no threads at the program's exit, where records are closed that no one closed.
  with multiprocessing.pool.ThreadPool() as threads:
    for name, (dtype, shape) in rows.fields.items():
      start, dataset = keep, file[name]
      assert isinstance(dataset, h5py.Dataset)
      length = block_length(dtype, shape)
      as_here = dataset.chunks and dataset.chunks[0] == length and dataset.compression == "gzip" and dataset.shuffle
      while start < total:
        stop = min(total, (start // length + 1) * length)  # whole chunks, where they lie
        block = rows.read(name, np.arange(start, stop) - keep).view(np.int8 if dtype.kind == "b" else dtype)
        if as_here and start % length == 0:
          _write_chunks(dataset, start, block, threads)
        else:
          dataset[start:stop] = block
        start = stop


def _write_chunks(
  dataset: h5py.Dataset, start: int, block: np.ndarray, threads: multiprocessing.pool.ThreadPool
) -> None:
  """Writes whole chunks from step `start` on, compressed as `FAST` says; HDF5 does that in one thread."""
  chunk = dataset.chunks
  assert chunk
  whole = np.zeros((chunk[0], *block.shape[1:]), block.dtype)
  whole[: len(block)] = block

  def packed(place: tuple[int, ...]) -> bytes:
    values = whole[(slice(None), *(slice(at, at + size) for at, size in zip(place, chunk[1:], strict=True)))]
    shuffled = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize).T
    # Runs alone: what floats have of longer repetitions is not worth twice the time.
    packer = zlib.compressobj(FAST["complevel"], strategy=zlib.Z_RLE)
    return packer.compress(shuffled.tobytes()) + packer.flush()

  axes = (range(0, size, step) for size, step in zip(block.shape[1:], chunk[1:], strict=True))
  places = list(itertools.product(*axes))
  for place, data in zip(places, threads.imap(packed, places), strict=True):
    dataset.id.write_direct_chunk((start, *place), data)
