"""Opens checkpoints of all formats, in one file, in several with an index, or in a folder."""

from __future__ import annotations

import contextlib
import json
import pathlib

import numpy as np

from sedjax._npz import NpzReader
from sedjax._orbax import OrbaxReader
from sedjax._reader import Reader, ReadError, told_as
from sedjax._safetensors import SafetensorsReader
from sedjax._torch import TorchReader


class ShardedReader(Reader):
  """Several files and an index `{"weight_map": {tensor: file}}`, as Hugging Face saves large models."""

  def __init__(self, path: pathlib.Path):
    self.tensors = {}
    self._shards: dict[str, Reader] = {}
    try:
      with told_as("index of shards"):
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
  suffix = ".pth" if path.name.endswith(".pth.tar") else path.suffix  # no archive, whatever it is called
  if suffix not in readers:
    raise ReadError(f"its name ends in none of {', '.join(readers)}, .index.json, and it is no folder")
  with told_as("checkpoint"):
    return readers[suffix](path)
