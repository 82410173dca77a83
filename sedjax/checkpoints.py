"""Reports from saved checkpoints, read one tensor at a time (extra `checkpoints`; `torch` for PyTorch's files).

A row is the change of the parameters from one checkpoint to the next, seen through the same sketch as in a live tracker
with `source="params"`: both agree up to rounding of the parameters where names and layouts are the same.

Names. A tensor's path has its components joined by "/"; a name without "/" ("h.0.attn.c_attn.weight") has its dots
turned into slashes. What wrappers add is dropped: `_orig_mod` and the like anywhere, `module` (and, as in live
trackers, `params`) where every path begins with it. `rename` and `transpose` do the rest: what PyTorch calls
`fc.weight` [out, in] is in flax `fc/kernel` [in, out], so `transpose=r"fc/weight"` and `rename={"weight$": "kernel"}`
give the sketch that a flax model has. A live tracker leaves dots in keys as they are: `rename={"/": "."}` gives the
sketch of parameters that are one dict with such keys.

Tensors. Integers, booleans, buffers (causal masks, rotary tables, running statistics) and everything outside of the
model in a training state, by its keys or by names such as `opt_state/0/mu/w`, are left out, and said. Tied tensors
count once: those that share memory in a PyTorch file, and matrices that are equal in the first and in the last
checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sedjax import core
from sedjax._compile import as_usual
from sedjax._dataset import needs_io, provenance, to_dataset
from sedjax._exact import exact_series
from sedjax._selection import Groups, Selection, group_function, left_out_lines, say_what_is_read, select, taken_lines
from sedjax._series import CheckpointError as CheckpointError
from sedjax._series import Entry, Path, find_series
from sedjax._store import Store, check_place, checkpoints_id, identity_of, replaceable, write_record
from sedjax._streams import sketch_series
from sedjax._types import Report
from sedjax._words import counted

if TYPE_CHECKING:
  import xarray as xr

__all__ = ["CheckpointError", "analyze"]


@as_usual
def analyze(
  files: Path | Iterable[Path],
  *,
  window: int | tuple[int, ...] = 10,
  every: int | None = None,
  k_max: int | None = None,
  sketch: Any = None,
  groups: Groups | None = None,
  momentum: float = 0.0,
  steps: Sequence[int] | None = None,
  rename: Mapping[str, str] | None = None,
  transpose: str | None = None,
  out: Path | None = None,
  progress: bool = True,
) -> xr.Dataset:
  r"""Computes the reports of a tracker from a series of checkpoints.

  What is taken and what is left out of the checkpoints is printed to stderr, and kept in the record's attributes
  `parameters_taken` and `parameters_left_out`. The module's docstring has the rules.

  Args:
    files: a glob pattern, or paths and patterns, of safetensors files, `*.index.json` of sharded ones, folders that
      Hugging Face saved, PyTorch files (a state dict, or a dict that holds one as "model", "state_dict", …), orbax
      folders, or npz files.
    window: int >= 3, rows in the window, or a tuple of ints; a row is the change from one checkpoint to the next.
    every: optimizer steps from one checkpoint to the next, for what noise with this `momentum` shows; None for the most
      frequent distance of steps.
    k_max, sketch, momentum: as for `sedjax.track_spectral_edge`. `sketch.exact()` needs no memory for rows: it sums
      inner products, in float64, over all checkpoints chunk by chunk.
    groups: None, a function from path to label (None: left out), or a mapping of regular expressions to names, of which
      the first that is found in the path counts (None: left out); the others are the group "rest".
    steps: of the files, ascending; None for the number that varies over their names.
    rename: regular expressions and replacements for paths, applied one after the other.
    transpose: a regular expression; tensors whose (renamed) path it is found in have their axes (out, in, …) turned to
      (…, in, out), as flax has the kernels that PyTorch stores as weights.
    out: file for the record (NetCDF). The unfinished analysis lies beside it in the folder `<out>.part`, so that the
      same call goes on where another one ended, or half a second before (exact: after each tensor). A record of the
      same checkpoints is replaced by one of as many rows or more, which keeps the user's series, events and attributes;
      any other file is not.
    progress: whether to show a bar, on a terminal.

  Returns:
    A record as `sedjax.record.to_dataset` makes it, over the steps of all checkpoints but the first.

  Raises:
    CheckpointError: `out` cannot be written or holds something else; no files, too few for the window, unknown,
      repeated or descending steps; a file that is missing, damaged, or would run code; a tensor that is missing, new,
      of another shape or dtype, not finite, or whose changes float32 cannot hold; a full disk. With `out`, the rows
      before it are in the record and are not computed again (exact: what was summed is kept, and rows come at the end).
    ValueError: an argument is out of its range.
    ImportError: the extra `checkpoints` is missing.

  Cost: one read of the files; the memory of some tens of MiB where safetensors are read, and of two of the largest
    tensor elsewhere, the state of a tracker, and a few sketches of the parameters in float64. Exact: 128 MiB beside
    the state; files are read in pieces, orbax arrays and compressed ones as often as they have pieces. To find tied
    tensors some numbers of each matrix are read twice.
  Source: arXiv 2603.15678, whose rows are differences of checkpoints. Departures: those of `track_spectral_edge`.

  Example:
    >>> import numpy as np, tempfile, sedjax.checkpoints
    >>> folder = tempfile.TemporaryDirectory()
    >>> for step in range(0, 60, 10):
    ...   np.savez(f"{folder.name}/step_{step}.npz", w=np.random.default_rng(step).normal(size=(40, 30)))
    >>> record = sedjax.checkpoints.analyze(f"{folder.name}/step_*.npz", window=4)
    >>> record.step.values.tolist(), dict(record.singular_values.sizes)["index"]
    ([10, 20, 30, 40, 50], 4)
    >>> record.attrs["parameters_taken"]
    'w [40, 30]'
  """
  needs_io()  # what could not be made or written after hours is told before them
  if out is not None:
    check_place(out)
  series = find_series(files, steps)
  if out is not None:
    replaceable(out, series)
  if every is None:
    gaps = collections.Counter(two.step - one.step for one, two in itertools.pairwise(series))
    every = gaps.most_common(1)[0][0] if gaps else 1
  # The rows come from outside, so that the state needs no parameters to subtract from, as "params" would have it.
  config = _config(window, every, k_max, sketch, group_function(groups), "updates", momentum)
  if len(series) == 1 and os.path.isdir(series[0].file):
    raise CheckpointError(
      f"sedjax analyze: {series[0].file} is one folder; give a series of checkpoints, as by {series[0].file + '/*'!r}."
    )
  if len(series) == 1:
    raise CheckpointError(
      f"sedjax analyze: {series[0].file} is one file alone; give a series of checkpoints, as by a pattern in quotes."
    )
  if len(series) - 1 < max(config.windows):
    raise CheckpointError(
      f"sedjax analyze: from {series[0].file} (step {series[0].step}) to {series[-1].file} there are {len(series)} "
      f"checkpoints, and so {counted(len(series) - 1, 'row')}, fewer than the window of {max(config.windows)}; give "
      "more of them or a smaller window."
    )
  selection = select(series, config, _checked_patterns(rename, transpose), transpose)
  say_what_is_read(series, selection, [*(groups if isinstance(groups, Mapping) else ()), *filter(None, [transpose])])
  store = Store(out, identity_of(series, selection, config.exact))
  found: list[tuple[int, Report]] = []
  try:
    with np.errstate(over="ignore", invalid="ignore"):  # which is told of below
      for i, report in (exact_series if config.exact else sketch_series)(series, selection, store, progress):
        found.append((i, report))
  except CheckpointError as error:
    if out is None or not found:
      raise
    written = False
    with contextlib.suppress(CheckpointError):  # the first error is the one to tell
      written = write_record(_record(series, selection, found), out, series)
    where = os.fspath(out) if written else f"{store.folder}, and {os.fspath(out)} is left as it was"
    raise CheckpointError(
      f"{error} The rows up to step {series[found[-1][0]].step} are kept in {where}; mend that and run it again to go "
      "on."
    ) from error
  else:
    record = _record(series, selection, found)
    if out is not None:
      write_record(record, out, series)
      store.remove()
    return record
  finally:
    store.close()


def _config(*arguments: Any) -> core.Config:
  """The configuration, whose errors speak of this function."""
  try:
    return core.Config(*arguments)
  except ValueError as error:
    raise ValueError(f"sedjax analyze: {error}") from None


def _checked_patterns(rename: Mapping[str, str] | None, transpose: str | None) -> tuple[tuple[str, str], ...]:
  pairs = tuple((rename or {}).items())
  for pattern in (*(pattern for pattern, _ in pairs), *([] if transpose is None else [transpose])):
    try:
      re.compile(pattern)
    except (re.error, TypeError) as error:
      raise ValueError(f"sedjax analyze: {pattern!r} is no regular expression ({error}).") from None
  return pairs


def _record(series: list[Entry], selection: Selection, found: list[tuple[int, Report]]) -> xr.Dataset:
  config = selection.config
  stacked = (np.stack(fields) for fields in zip(*(report for _, report in found), strict=True))
  reports = Report(*stacked)  # pyright: ignore[reportArgumentType] - in NumPy
  known = provenance(config, jax.devices()[0]) | {"source": "params"}
  attrs = {name: value for name, value in known.items() if value is not None} | {
    "sketch_id": list(config.sketch.sketch_id),
    "checkpoints": f"{series[0].file} … {series[found[-1][0]].file}",
    "checkpoints_id": checkpoints_id(series),
    "parameters_taken": "\n".join(taken_lines(selection)),
    "parameters_left_out": "\n".join(left_out_lines(selection)),
  }
  return to_dataset(
    reports,
    steps=[series[i].step for i, _ in found],
    windows=config.windows,
    groups=selection.groups,
    attrs=attrs,
  )
