"""What users hand to a record, checked, and as it can be kept."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from sedjax._dataset import DIMS, FIELDS, storable

_copy = jax.jit(jax.numpy.copy)


def own_copy(value: Any) -> Any:
  """An array of the recorder's own: the caller's may be donated or written into before it is read."""
  if isinstance(value, Tracer):
    return value
  if isinstance(value, np.ma.MaskedArray):  # what is masked is absent, whatever number lies under the mask
    return np.ma.filled(value.astype(np.float64), np.nan)
  return _copy(value) if isinstance(value, jax.Array) else np.array(value)


def step_of(step: Any) -> int:
  """A step as a number of the host's."""
  if isinstance(step, jax.Array):  # to read it would wait for the device
    raise TypeError("sedjax.record: step must be a Python int, got an array; count steps on the host.")
  if not hasattr(step, "__index__"):
    raise TypeError(f"sedjax.record: step must be an int, got {step!r}; give the number of the optimizer step.")
  step = operator.index(step)
  if not 0 <= step < 2**63:
    raise ValueError(f"sedjax.record: step must be an int in 0…2**63 - 1, got {step}.")
  return step


def check_series(name: str, value: Any) -> None:
  """Refuses a series that a record cannot have: by its name, or by what would be its values."""
  if not name.isidentifier():
    raise ValueError(f"sedjax.record: a series cannot be named {name!r}; give it a name that Python would accept.")
  if name.endswith("_step") or name in {*FIELDS, *DIMS, "index", "event"}:
    raise ValueError(f"sedjax.record: a series cannot be named {name!r}; the record uses that name.")
  if isinstance(value, Tracer):
    raise ValueError("sedjax.record: log was called inside jit; call it outside, with what jit returned.")
  dtype = (value if isinstance(value, jax.Array) else np.asarray(value)).dtype
  if (
    np.ndim(value) > 1
    or np.shape(value) == (0,)
    or not any(jax.numpy.issubdtype(dtype, kind) for kind in (bool, np.integer, np.floating))
  ):
    raise ValueError(f"sedjax.record: {name} must be a number or an array over seeds, got {_kind(value)}.")


def _kind(value: Any) -> str:
  """What was given, in words."""
  return f"{type(value).__name__} of shape {np.shape(value)}" if np.ndim(value) else type(value).__name__


def seed_names(seeds: Any) -> list[Any]:
  """Names that are distinct and that the file can hold."""
  found = np.asarray(seeds)
  names = found.tolist()
  if found.ndim != 1 or found.dtype.kind not in "iuU" or (found.dtype.kind == "u" and max(names, default=0) >= 2**63):
    raise ValueError(f"sedjax.record: seeds must be a list of 64-bit ints or of texts, got {seeds!r}.")
  if any(storable(name) != name for name in names):
    raise ValueError(f"sedjax.record: seeds={names} have NUL or halves of characters in them; leave those out.")
  if len(set(names)) < len(names):
    raise ValueError(f"sedjax.record: seeds={names} names some twice; give each a name of its own.")
  return names


def windows_and_groups(windows: Sequence[int], groups: Sequence[str]) -> tuple[list[int], list[str]]:
  """Those of reports, which come without them."""
  sizes, names = list(map(operator.index, windows)), [storable(str(group)) for group in groups]
  if not sizes or sizes[0] < 1 or any(two <= one for one, two in itertools.pairwise(sizes)):
    raise ValueError(f"sedjax.record: windows must be ascending sizes, as of the tracker, got {windows!r}.")
  if len(set(names)) < len(names):
    raise ValueError(f"sedjax.record: groups={names} names some twice; give each a name of its own.")
  return sizes, names


def file_attributes(values: Mapping[str, Any]) -> dict[str, Any]:
  """As a record has them; those that are None are left out."""
  return {name: storable(_plain(value)) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
  """As an attribute of a file can be: text, a number, or a list of numbers."""
  if isinstance(value, np.generic | np.ndarray):
    value = value.tolist()
  if isinstance(value, bool):
    return int(value)
  if isinstance(value, str) or _is_number(value):
    return value
  if isinstance(value, list | tuple) and value:
    numbers = [_plain(each) for each in value]
    if all(map(_is_number, numbers)):
      return numbers
  return str(value)


def _is_number(value: Any) -> bool:
  """Whether a file can hold it as a number."""
  return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
