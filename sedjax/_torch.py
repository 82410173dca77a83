"""Reads PyTorch files."""

from __future__ import annotations

import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sedjax._reader import Reader, ReadError, TensorInfo, new_name, told_as
from sedjax._training import flatten, model_keys, within

# What PyTorch mapped and touched counts as the process's memory until it is unmapped.
_MAPPED = 2**28


class TorchReader(Reader):
  """What `torch.save` wrote: a state dict, or a dict with one under a usual name; nothing in it is executed."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._load()

  def _load(self) -> None:
    with told_as("PyTorch file"):
      import torch  # pyright: ignore[reportMissingImports]

      with open(self._path, "rb") as file:
        mappable = file.read(4) == b"PK\x03\x04"
      try:
        with warnings.catch_warnings():
          warnings.simplefilter("ignore")
          loaded = torch.load(self._path, map_location="cpu", weights_only=True, mmap=mappable)
      except Exception as error:
        if "Weights only load failed" in str(error) or "weights_only" in str(error):
          found = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|global):? ([\w.]+)", str(error))
          named = f" ({next(filter(None, found.groups()))})" if found else ""
          raise ReadError(
            f"its pickle asks for more than tensors{named}, which could run code, and is refused or damaged; save it "
            "with torch.save(model.state_dict(), file)"
          ) from error
        raise
      if not isinstance(loaded, Mapping):
        raise ReadError(f"it holds a {type(loaded).__name__}, not a dict of tensors")
      self._tensors: dict[str, Any] = {}
      self.tensors, self._touched = {}, 0
      inside = model_keys(loaded, lambda value: isinstance(value, torch.Tensor), anywhere=True)
      for names, value in flatten(loaded):
        if isinstance(value, torch.Tensor):
          names, why_not = within(names, inside)
          name = new_name(".".join(names), self.tensors)
          self._tensors[name] = value.detach()
          self.tensors[name] = _torch_info(value, why_not)

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    with told_as("PyTorch file"):
      if self._touched + out.nbytes > _MAPPED:
        self._tensors = {}
        self._load()
      self._touched += out.nbytes
      flat = self._tensors[name].resolve_conj().resolve_neg().reshape(-1)[start : start + out.size]
      if flat.element_size() != out.itemsize or flat.numel() != out.size:
        raise ReadError("the file changed while it was read")
      np.copyto(out, _torch_array(flat))

  def close(self) -> None:
    self._tensors = {}


def _torch_info(tensor: Any, why_not: str) -> TensorInfo:
  import torch  # pyright: ignore[reportMissingImports]

  shape = tuple(tensor.shape)
  if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
    return TensorInfo(shape, None, why_not or "it is sparse, quantized or without data")
  dtype = _torch_dtype(tensor.dtype)
  if dtype is None:
    return TensorInfo(shape, None, why_not or f"dtype {tensor.dtype} cannot be read")
  if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
    return TensorInfo(shape, None, why_not or "it repeats fewer numbers, as torch.Tensor.expand does")
  return TensorInfo(shape, dtype, why_not, _torch_memory(tensor) if tensor.numel() else None)


def _torch_memory(tensor: Any) -> tuple[Any, ...]:
  """Which numbers of which storage a tensor holds, whatever the order and grouping of its axes."""
  steps: list[tuple[int, int]] = []  # stride and size of axes, those that lie side by side as one
  for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
    if steps and stride == steps[-1][0] * steps[-1][1]:
      steps[-1] = (steps[-1][0], steps[-1][1] * size)
    elif size > 1:
      steps.append((stride, size))
  return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.element_size(), *steps


def _torch_dtype(dtype: Any) -> np.dtype | None:
  name = str(dtype).removeprefix("torch.")
  special = {"bfloat16": jnp.bfloat16, "float8_e4m3fn": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2}
  try:
    return np.dtype(special.get(name, name))
  except TypeError:
    return None


def _torch_array(flat: Any) -> np.ndarray:
  import torch  # pyright: ignore[reportMissingImports]

  dtype = _torch_dtype(flat.dtype)
  if dtype is not None and dtype.isbuiltin == 1:
    return flat.numpy()
  return flat.view({1: torch.uint8, 2: torch.int16}[flat.element_size()]).numpy().view(dtype)
