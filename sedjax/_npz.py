"""Reads npz files."""

from __future__ import annotations

import pathlib
import zipfile
from typing import Any

import numpy as np

from sedjax._reader import Reader, ReadError, TensorInfo, fill, is_size, told_as


def _skip(file: Any, count: int) -> None:
  """Reads on: `seek` would make newer zipfile modules forget the checksum."""
  while count > 0:
    count -= len(file.read(min(count, 2**20))) or count


class NpzReader(Reader):
  """What `np.savez` wrote; nothing in it is unpickled."""

  def __init__(self, path: pathlib.Path):
    self.tensors, self._members = {}, {}
    with told_as("npz file"):
      self._zip = zipfile.ZipFile(path)
      try:
        for member in self._zip.infolist():
          if member.filename.endswith(".npy"):
            self._add(member)
      except BaseException:
        self._zip.close()
        raise

  def _add(self, member: zipfile.ZipInfo) -> None:
    name = member.filename.removesuffix(".npy")
    with self._zip.open(member) as file:
      version = np.lib.format.read_magic(file)
      headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
      if version not in headers:
        raise ReadError(f"array {name!r} has the unknown npy version {version}")
      shape, fortran, dtype = headers[version](file)
      at = file.tell()
    if not all(map(is_size, shape)):
      raise ReadError(f"array {name!r} has the shape {shape}")
    if dtype.hasobject:
      info = TensorInfo(shape, None, "it holds pickled objects, which are not loaded, since they could run code")
    elif dtype.kind not in "fciub":
      info = TensorInfo(shape, None, f"dtype {dtype} is no number; save bfloat16 as float32")
    elif dtype.itemsize > (16 if dtype.kind == "c" else 8):
      info = TensorInfo(shape, None, f"dtype {dtype} cannot be read")
    else:
      info = TensorInfo(shape, dtype.newbyteorder("="))
      if at + info.size * dtype.itemsize != member.file_size:
        raise ReadError(f"array {name!r} of shape {shape} and dtype {dtype} has {member.file_size - at} bytes")
    self.tensors[name], self._members[name] = info, (member, at, fortran, not dtype.isnative)

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    member, at, fortran, swapped = self._members[name]
    with told_as("npz file"), self._zip.open(member) as file:
      _skip(file, at + (0 if fortran else start * out.itemsize))
      if fortran and len(self.tensors[name].shape) > 1:
        whole = np.empty(self.tensors[name].size, out.dtype)
        fill(file, whole)
        out[:] = whole.reshape(self.tensors[name].shape, order="F").reshape(-1)[start : start + out.size]
      else:
        fill(file, out)
        file.read(1)  # at the end, zipfile compares the checksum
    if swapped:
      out.byteswap(inplace=True)

  def close(self) -> None:
    self._zip.close()
