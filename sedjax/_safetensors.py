"""Reads safetensors files."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from sedjax._reader import Reader, ReadError, TensorInfo, fill, is_size, told_as

# The format is read here, and not by its library, which maps the whole file and copies every tensor once more.
_SAFETENSORS_DTYPES: dict[str, Any] = {
  "F64": "<f8",
  "F32": "<f4",
  "F16": "<f2",
  "BF16": jnp.bfloat16,
  "F8_E4M3": jnp.float8_e4m3fn,
  "F8_E5M2": jnp.float8_e5m2,
  "C64": "<c8",
  "I64": "<i8",
  "I32": "<i4",
  "I16": "<i2",
  "I8": "i1",
  "U64": "<u8",
  "U32": "<u4",
  "U16": "<u2",
  "U8": "u1",
  "BOOL": "?",
}
_HEADER_LIMIT = 100_000_000  # the format's own


class SafetensorsReader(Reader):
  """One safetensors file."""

  in_parts = True

  def __init__(self, path: pathlib.Path):
    self.tensors, self._starts = {}, {}
    with told_as("safetensors file"):
      self._file = open(path, "rb", buffering=0)
      try:
        self._read_header(os.fstat(self._file.fileno()).st_size)
      except BaseException:
        self._file.close()
        raise

  def _read_header(self, file_size: int) -> None:
    length = int.from_bytes(self._file.read(8), "little")
    if file_size < 8 or length > min(_HEADER_LIMIT, file_size - 8):
      raise ReadError("it is truncated or no safetensors file: its header would be longer than the file")
    text = np.empty(length, np.uint8)
    fill(self._file, text)
    header = json.loads(text.tobytes())
    if not isinstance(header, dict):
      raise ReadError("its header is no JSON object")
    header.pop("__metadata__", None)
    ends = []
    for name, entry in header.items():
      shape, (start, end) = entry["shape"], entry["data_offsets"]
      if not isinstance(shape, list) or not all(map(is_size, (*shape, start, end))) or start > end:
        raise ReadError(f"its header has no valid shape and offsets for tensor {name!r}")
      kind = _SAFETENSORS_DTYPES.get(entry["dtype"])
      if kind is None:
        info = TensorInfo(tuple(shape), None, f"dtype {entry['dtype']} cannot be read")
      else:
        info = TensorInfo(tuple(shape), np.dtype(kind))
        if math.prod(shape) * np.dtype(kind).itemsize != end - start:
          raise ReadError(f"tensor {name!r} of shape {shape} and dtype {entry['dtype']} has {end - start} bytes")
      self.tensors[name], self._starts[name] = info, 8 + length + start
      ends.append((start, end))
    at = 0
    for start, end in sorted(ends):
      if start != at:
        raise ReadError("its tensors overlap or leave gaps")
      at = end
    if 8 + length + at != file_size:
      raise ReadError(f"it has {file_size} bytes, its header promises {8 + length + at}: it is truncated or damaged")

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    with told_as("safetensors file"):
      fill(self._file, out, self._starts[name] + start * out.itemsize)

  def close(self) -> None:
    self._file.close()
