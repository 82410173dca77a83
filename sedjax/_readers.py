"""Readers of checkpoint files, one for each format, that hand out any part of one tensor at a time.

A reader knows the names, shapes and dtypes of a file's tensors when it is opened, and copies their numbers straight
into a buffer that the caller owns. Files are not mapped into memory, or not for long, so that a process holds what it
asked for and no more. Whatever is wrong with a file becomes a `ReadError`, which says so in one clause.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sedjax._training import flatten, is_list, model_keys, within

# What PyTorch mapped and touched counts as the process's memory until it is unmapped.
_MAPPED = 2**28


class ReadError(Exception):
  """What is wrong with a file, in a clause without a full stop."""


class TensorInfo(NamedTuple):
  """What is known of a tensor before it is read."""

  shape: tuple[int, ...]
  dtype: np.dtype | None  # None where it cannot be read
  why_not: str = ""  # why it does not belong to the model, or cannot be read
  storage: Hashable = None  # tensors that share one are one; None where a format does not tell

  @property
  def size(self) -> int:
    return math.prod(self.shape)


class Reader:
  """A checkpoint that is open."""

  tensors: dict[str, TensorInfo]  # by name, as in the file
  # Whether parts of tensors are read at no more cost than the whole, and by several threads at a time.
  in_parts = False

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    """Fills `out` [n] with the numbers start … start + n - 1 of a tensor in row-major order.

    Raises:
      ReadError: the file is damaged or ends too early.
    """
    raise NotImplementedError

  def close(self) -> None:
    """Closes the files."""


# What the system says of its disks, rights and limits, and not because a file is damaged.
_NOT_THE_FILES = {
  errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV
}  # fmt: skip


@contextlib.contextmanager
def _told_as(what: str) -> Iterator[None]:
  """Turns whatever a library raises over a damaged file into a ReadError."""
  try:
    yield
  except ReadError:
    raise
  except FileNotFoundError as error:
    raise ReadError(f"{error.filename or 'the file'} does not exist") from error
  except OSError as error:
    if error.errno in _NOT_THE_FILES:
      raise ReadError(f"it cannot be read: {error.strerror}") from error
    raise _damaged(what, error) from error
  except ImportError as error:
    raise ReadError(f"reading {what} needs the package {error.name!r}, which is not installed") from error
  except MemoryError as error:
    raise ReadError(f"it asks for more memory than there is, and is no valid {what}") from error
  except Exception as error:
    raise _damaged(what, error) from error


def _damaged(what: str, error: Exception) -> ReadError:
  lines = str(error).strip().splitlines()
  return ReadError(f"it is damaged or no {what} ({type(error).__name__}: {lines[0][:200] if lines else 'no message'})")


def _fill(file: Any, out: np.ndarray, at: int | None = None) -> None:
  """Fills an array from the place where a file is, or from an offset, as several threads may at a time."""
  view: Any = memoryview(out.view(np.uint8))  # pyright: ignore[reportArgumentType]
  done = 0
  while done < len(view):
    rest = view[done:]
    count = file.readinto(rest) if at is None else os.preadv(file.fileno(), [rest], at + done)
    if not count:
      raise ReadError("the file ends in the middle of the tensor")
    done += count


# ---- safetensors ----

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


def _is_size(value: Any) -> bool:
  return type(value) is int and 0 <= value < 2**63


class SafetensorsReader(Reader):
  """One safetensors file."""

  in_parts = True

  def __init__(self, path: pathlib.Path):
    self.tensors, self._starts = {}, {}
    with _told_as("safetensors file"):
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
    _fill(self._file, text)
    header = json.loads(text.tobytes())
    if not isinstance(header, dict):
      raise ReadError("its header is no JSON object")
    header.pop("__metadata__", None)
    ends = []
    for name, entry in header.items():
      shape, (start, end) = entry["shape"], entry["data_offsets"]
      if not isinstance(shape, list) or not all(map(_is_size, (*shape, start, end))) or start > end:
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
    with _told_as("safetensors file"):
      _fill(self._file, out, self._starts[name] + start * out.itemsize)

  def close(self) -> None:
    self._file.close()


# ---- several files with an index ----


class ShardedReader(Reader):
  """Several files and an index `{"weight_map": {tensor: file}}`, as Hugging Face saves large models."""

  def __init__(self, path: pathlib.Path):
    self.tensors = {}
    self._shards: dict[str, Reader] = {}
    try:
      with _told_as("index of shards"):
        self._where = dict(json.loads(path.read_bytes())["weight_map"])
        for shard in self._where.values():
          own = isinstance(shard, str) and shard and pathlib.PurePath(shard).name == shard
          if not own or shard.endswith(".json") or (path.parent / shard).is_dir():
            raise ReadError(
              f"its weight_map names {shard!r}, which lies outside of its folder or is no file of tensors"
            )
      for name, shard in self._where.items():
        if shard not in self._shards:
          if not (path.parent / shard).exists():
            raise ReadError(f"its shard {shard} does not exist")
          try:
            self._shards[shard] = open_checkpoint(path.parent / shard)
          except ReadError as error:
            raise ReadError(f"its shard {shard} cannot be read: {error}") from error
        if name not in self._shards[shard].tensors:
          raise ReadError(f"its shard {shard} lacks tensor {name!r}")
        self.tensors[name] = self._shards[shard].tensors[name]
      for shard, reader in self._shards.items():
        for name in reader.tensors.keys() - self.tensors.keys():
          self.tensors[name] = reader.tensors[name]._replace(why_not=f"outside of the index, though {shard} holds it")
      self.in_parts = all(shard.in_parts for shard in self._shards.values())
    except BaseException:
      self.close()
      raise

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    try:
      self._shards[self._where[name]].read(name, start, out)
    except ReadError as error:
      raise ReadError(f"in shard {self._where[name]}, {error}") from error

  def close(self) -> None:
    for shard in self._shards.values():
      shard.close()


# ---- npz ----


class NpzReader(Reader):
  """What `np.savez` wrote; nothing in it is unpickled."""

  def __init__(self, path: pathlib.Path):
    self.tensors, self._members = {}, {}
    with _told_as("npz file"):
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
    if not all(map(_is_size, shape)):
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
    with _told_as("npz file"), self._zip.open(member) as file:
      file.seek(at + (0 if fortran else start * out.itemsize))
      if fortran and len(self.tensors[name].shape) > 1:
        whole = np.empty(self.tensors[name].size, out.dtype)
        _fill(file, whole)
        out[:] = whole.reshape(self.tensors[name].shape, order="F").reshape(-1)[start : start + out.size]
      else:
        _fill(file, out)
        file.read(1)  # at the end, zipfile compares the checksum
    if swapped:
      out.byteswap(inplace=True)

  def close(self) -> None:
    self._zip.close()


# ---- PyTorch ----


class TorchReader(Reader):
  """What `torch.save` wrote: a state dict, or a dict with one under a usual name; nothing in it is executed."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._load()

  def _load(self) -> None:
    with _told_as("PyTorch file"):
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
          name = _new(".".join(names), self.tensors)
          self._tensors[name] = value.detach()
          self.tensors[name] = _torch_info(value, why_not)

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    with _told_as("PyTorch file"):
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


# ---- orbax ----


class OrbaxReader(Reader):
  """A folder that orbax wrote: a tree of arrays, or a step of a CheckpointManager with one item."""

  def __init__(self, path: pathlib.Path):
    with _told_as("orbax checkpoint"):
      import jax
      import orbax.checkpoint as ocp

      if not (path / "_METADATA").exists():
        items = sorted(item.parent for item in path.glob("*/_METADATA"))
        if len(items) > 1:
          names = ", ".join(item.name for item in items)
          raise ReadError(f"it has several items ({names}); give the folder of the one with the parameters")
        path = items[0]
      self._path, self._ocp, self._handler = path.absolute(), ocp, ocp.PyTreeCheckpointer()
      found: Any = self._handler.metadata(self._path)
      found = getattr(found, "item_metadata", found)
      self._tree: Any = getattr(found, "tree", found)
      if self._tree is None:  # orbax logs why, and goes on
        raise ReadError("it is a damaged orbax checkpoint, whose metadata cannot be read")
      inside = model_keys(self._tree, lambda value: hasattr(value, "shape"), anywhere=False)
      self._in_lists = _has_lists(self._tree)
      self.tensors, self._keys = {}, {}
      for keys, value in flatten(self._tree):
        shape = getattr(value, "shape", None)
        if shape is None or getattr(value, "dtype", None) is None:
          continue
        names, why_not = within(keys, inside)
        name = _new("/".join(names), self.tensors)
        if type(value).__name__ == "ScalarMetadata":
          why_not = why_not or "it is a Python number"
        self.tensors[name] = TensorInfo(tuple(shape), np.dtype(value.dtype), why_not)
        self._keys[name] = keys
      del jax
    self._last: tuple[str, np.ndarray] | None = None

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    with _told_as("orbax checkpoint"):
      if self._last is None or self._last[0] != name:  # parts of one tensor are asked for in a row
        self._last = None
        self._last = (name, self._restore(name))
      flat = self._last[1].reshape(-1)
      out[:] = flat[start : start + out.size]
      if start + out.size == flat.size:
        self._last = None

  def _restore(self, name: str) -> np.ndarray:
    ocp, keys = self._ocp, self._keys[name]
    args = ocp.args.PyTreeRestore(
      item=_only(self._tree, keys, np.zeros(()), self._in_lists),
      restore_args=_only(self._tree, keys, ocp.RestoreArgs(restore_type=np.ndarray), self._in_lists),
      partial_restore=not self._in_lists,
    )
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      found: Any = self._handler.restore(self._path, args=args)
    for key in keys:
      found = found[int(key) if isinstance(found, list | tuple) else key]
    array, info = np.asarray(found), self.tensors[name]
    if array.shape != info.shape or array.dtype != info.dtype:
      raise ReadError(f"it has shape {array.shape} and dtype {array.dtype}, not those of the checkpoint's metadata")
    return array

  def close(self) -> None:
    self._handler.close()


def _only(tree: Any, keys: tuple[str, ...], leaf: Any, whole: bool) -> Any:
  """The part of a tree that leads to one leaf, or the whole tree with placeholders for all others.

  Orbax wants the whole where there are lists, and takes longer over it.
  """
  if not keys:
    return leaf
  if isinstance(tree, Mapping):
    own = next(key for key in tree if str(key) == keys[0])
    others = {key: _placeholders(value) for key, value in tree.items()} if whole else {}
    return others | {own: _only(tree[own], keys[1:], leaf, whole)}
  return [_only(x, keys[1:], leaf, whole) if str(i) == keys[0] else _placeholders(x) for i, x in enumerate(tree)]


def _placeholders(tree: Any) -> Any:
  """The tree with orbax's placeholder for each leaf."""
  if isinstance(tree, Mapping):
    return {key: _placeholders(value) for key, value in tree.items()}
  return [_placeholders(value) for value in tree] if is_list(tree) else ...


def _has_lists(tree: Any) -> bool:
  return is_list(tree) or (isinstance(tree, Mapping) and any(map(_has_lists, tree.values())))


def _new(name: str, known: Mapping[str, Any]) -> str:
  """The name, which no other tensor may have."""
  if name in known:
    raise ReadError(f"two tensors are named {name!r}, by names within names; rename one")
  return name


# ---- all formats ----

_IN_FOLDERS = (
  "model.safetensors.index.json",
  "model.safetensors",
  "pytorch_model.bin.index.json",
  "pytorch_model.bin",
)


def checkpoint_file(path: pathlib.Path) -> pathlib.Path:
  """The file to open for a path: a folder that Hugging Face saved stands for the model's file in it.

  Beside safetensors the same model may lie as PyTorch's files, of which the former are taken.
  """
  return next((path / name for name in _IN_FOLDERS if (path / name).exists()), path)


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
  """All files that a checkpoint consists of, as far as they are there."""
  path = checkpoint_file(path)
  if path.is_dir():
    return sorted(file for file in path.rglob("*") if file.is_file())
  shards: set[str] = set()
  if path.name.endswith(".index.json"):
    with contextlib.suppress(Exception):  # a damaged one is told where it is read
      shards = {shard for shard in json.loads(path.read_bytes())["weight_map"].values() if isinstance(shard, str)}
  return [path, *sorted(path.parent / shard for shard in shards if (path.parent / shard).is_file())]


def open_checkpoint(path: pathlib.Path) -> Reader:
  """Opens a checkpoint of any known format.

  Raises:
    ReadError: it does not exist, is damaged, or is of no known format.
  """
  given, path = path, checkpoint_file(path)
  if not path.exists():
    raise ReadError("it does not exist")
  if path.is_dir():
    if not any(path.glob("_METADATA")) and not any(path.glob("*/_METADATA")):
      raise ReadError(f"this folder has neither orbax's _METADATA nor any of {', '.join(_IN_FOLDERS)} in it")
    return OrbaxReader(path)
  if not path.is_file():
    raise ReadError("it is neither a file nor a folder")
  if path.name.endswith(".index.json"):
    single = given / path.name.removesuffix(".index.json")
    if single.exists() and single not in files_of(path):
      raise ReadError(
        f"this folder has both {single.name} and {path.name}, which may differ; give one of the two files"
      )
    return ShardedReader(path)
  readers = {".safetensors": SafetensorsReader, ".npz": NpzReader}
  readers |= dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), TorchReader)
  if path.suffix not in readers:
    raise ReadError(f"its name ends in none of {', '.join(readers)}, .index.json, and it is no folder")
  with _told_as("checkpoint"):
    return readers[path.suffix](path)
