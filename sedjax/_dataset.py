"""What a record is: its fields, their names and units, and how reports are arranged in it."""

from __future__ import annotations

import contextlib
import datetime
import enum
import importlib.metadata
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sedjax import core
from sedjax._state import INTEGERS
from sedjax._types import VECTOR_FIELDS, Phase, Report, Status

if TYPE_CHECKING:
  import xarray as xr

VERSION = 1
DIMS = ("step", "seed", "window", "group")
WHOLE = "all"
LENGTH = "parameter units"
# By field of a report: what axes call it, and its unit ("1" where it has none).
FIELDS = {
  "singular_values": ("singular value σ_k", LENGTH),
  "ratios": ("ratio σ_k / σ_(k+1)", "1"),
  "k_star": ("spectral edge k*", "1"),
  "gap_ratio": ("gap ratio at k*", "1"),
  "null_ratio": ("ratio that noise seldom exceeds at k*", "1"),
  "edge_ambiguous": ("edge within the sketch's error of another", "1"),
  "pc1_fraction": ("share of σ_1² in the sum of squares", "1"),
  "k95": ("directions that hold 95 % of the sum of squares", "1"),
  "drift_speed": ("norm of the mean row", LENGTH),
  "alignment": ("|cos| of newest row and leading direction", "1"),
  "turning": ("turn of the leading direction, 1 - |cos|", "1"),
  "last_update_norm": ("norm of the newest row", LENGTH),
  "effective_dim": ("effective dimension of the sketch", "1"),
  "phase": ("phase", "1"),
  "count": ("rows pushed", "1"),
  "row_steps": ("optimizer steps in the newest row", "1"),
  "skipped_nonfinite": ("steps left out as not finite", "1"),
  "skipped_zero": ("steps of zero update left out", "1"),
  "status": ("status bits", "1"),
}
# Attributes that NetCDF or the record itself has.
RESERVED = ("record_version", "DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "_Netcdf4Dimid", "_NCProperties")
_OPTIONS = ("every", "source", "momentum", "k_max")
# Attributes that a tracker's arguments have.
TOLD = (*_OPTIONS, "windows", "sketch", "sketch_id")
DTYPES = {name: "<i4" for name in INTEGERS} | {"edge_ambiguous": "?"}


def needs_io() -> None:
  """Refuses to go on without the extra's packages.

  Raises:
    ImportError: they are missing; the message names the extra.
  """
  try:
    import h5netcdf  # noqa: F401
    import xarray  # noqa: F401
  except ImportError as error:
    raise ImportError("sedjax.record needs xarray and h5netcdf: pip install 'sedjax[io]'.") from error


def to_dataset(
  reports: Report,
  *,
  steps: Sequence[int] | np.ndarray,
  windows: Sequence[int],
  groups: Sequence[str] = (WHOLE,),
  seeds: Sequence[int] = (0,),
  attrs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
  """Labels reports.

  Args:
    reports: what `get_reports` returned, stacked along a leading axis of steps: fields [step, seed, group, window], or
      [step, group, window] for one seed; vectors have one more axis.
    steps: the optimizer steps that the leading axis stands for, ascending.
    windows: the tracker's windows, ascending.
    groups: names of the group axis; the first is the whole model.
    seeds: names of the seed axis.
    attrs: provenance, kept as the record's attributes.

  Returns:
    A `Dataset` over step, seed, window, group and index.

  Raises:
    ValueError: an axis does not have as many entries as names were given for it, or steps do not ascend.
    ImportError: the extra `io` is missing.

  Example:
    >>> import jax, jax.numpy as jnp, sedjax, sedjax.record
    >>> tx = sedjax.track_spectral_edge(window=(3, 5))
    >>> reports = sedjax.get_reports(tx.init({"w": jnp.ones(3)}))
    >>> record = sedjax.record.to_dataset(jax.tree.map(lambda x: x[None], reports), steps=[0], windows=(3, 5))
    >>> dict(record.singular_values.sizes)
    {'step': 1, 'seed': 1, 'window': 2, 'group': 1, 'index': 5}
  """
  needs_io()
  import xarray as xr

  at = np.asarray(steps, np.int64)
  if at.ndim != 1 or np.any(np.diff(at) <= 0):
    raise ValueError(f"sedjax.record: steps must be one-dimensional and ascend, got {steps}.")
  sizes = {"step": len(at), "seed": len(seeds), "window": len(windows), "group": len(groups)}
  index = np.arange(1, max(windows) + 1)
  variables = {}
  for name, values in arrange(reports, sizes, windows).items():
    dims = (*DIMS, "index") if name in VECTOR_FIELDS else DIMS
    variables[name] = (dims, values, attributes(name))
  coords = {
    "step": ("step", at, {"long_name": "optimizer step", "units": "steps"}),
    "seed": ("seed", np.asarray(seeds), {"long_name": "seed"}),
    "window": ("window", np.asarray(windows, np.int64), {"long_name": "window", "units": "rows"}),
    "group": ("group", np.asarray([storable(name) for name in groups], object), {"long_name": "group of parameters"}),
    "index": ("index", index, {"long_name": "place k in the spectrum", "units": "1"}),
  }
  attrs = {name: storable(value) for name, value in (attrs or {}).items()}
  return xr.Dataset(variables, coords, {"record_version": VERSION, **attrs})


def storable(value: Any) -> Any:
  """Text as HDF5 can store it, without NUL and halves of characters; anything else as it is."""
  if not isinstance(value, str):
    return value
  return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def arrange(reports: Report, sizes: Mapping[str, int], windows: Sequence[int]) -> dict[str, np.ndarray]:
  """Fields as a record has them, [step, seed, window, group] or also [index], from those that `to_dataset` takes."""
  index = np.arange(1, max(windows) + 1)
  last = {"singular_values": np.asarray(windows), "ratios": np.asarray(windows) - 1}
  arranged = {}
  for name, field in zip(Report._fields, reports, strict=True):
    values = np.asarray(field)
    vector = name in VECTOR_FIELDS
    if values.ndim == 3 + vector:
      values = values[:, None]
    expected = (sizes["step"], sizes["seed"], sizes["group"], sizes["window"])
    if values.shape[:4] != expected or values.ndim != 4 + vector:
      raise ValueError(
        f"sedjax.record: {name} has shape {np.shape(field)}, expected [step, seed, group, window] = {list(expected)} "
        "from the steps, seeds, groups and windows given; pass get_reports(state), stacked along a leading axis."
      )
    values = np.swapaxes(values, 2, 3)
    if vector:
      values = np.pad(values, [(0, 0)] * 4 + [(0, len(index) - values.shape[4])])
      values = np.where((index <= last[name][:, None])[:, None, :], values, np.float32(np.nan))
    arranged[name] = values
  return arranged


def provenance(config: core.Config | None, device: Any) -> dict[str, Any]:
  """Where a record comes from, as its attributes say: this program, and as far as they are known tracker and device."""
  found: dict[str, Any] = {
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": shlex.join(sys.argv),
  }
  for name in ("sedjax", "jax", "jaxlib", "numpy", "optax"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[f"{name}_version"] = importlib.metadata.version(name)
  if device is not None:
    found["device"] = f"{device.platform} ({device.device_kind})"
  if config is not None:
    sketch = config.sketch
    found |= {name: getattr(config, name) for name in _OPTIONS}
    found["windows"] = list(config.windows)
    found["sketch"] = f"{type(sketch).__name__.lower()}, dim {sketch.dim}, seed {sketch.seed}"
  return found


def attributes(name: str) -> dict[str, Any]:
  """Of a field's variable: its long name, unit, and the meaning of its values where they are a code."""
  long_name, units = FIELDS[name]
  found: dict[str, Any] = {"long_name": long_name, "units": units}
  if name == "phase":
    return found | _flags("flag_values", Phase)
  if name == "status":
    return found | _flags("flag_masks", Status)
  return found


def _flags(kind: str, members: type[enum.IntEnum] | type[enum.IntFlag]) -> dict[str, Any]:
  names = {member.value: name.lower() for name, member in members.__members__.items()}
  return {kind: list(names), "flag_meanings": " ".join(names.values())}


def empty_dataset(layout: Mapping[str, Any]) -> xr.Dataset:
  """A record of no steps."""
  names = layout["windows"], layout["groups"], layout["seeds"]
  windows, groups, seeds = map(len, names)
  longest = max(layout["windows"])
  vectors = {"singular_values": longest, "ratios": longest - 1}
  fields = {}
  for name in Report._fields:
    shape = (0, seeds, groups, windows, *([vectors[name]] if name in vectors else []))
    fields[name] = np.zeros(shape, DTYPES.get(name, "<f4"))
  return to_dataset(
    Report(**fields), steps=[], windows=names[0], groups=names[1], seeds=names[2], attrs=layout["attrs"]
  )
