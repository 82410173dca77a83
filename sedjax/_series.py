"""A series of checkpoint files and the steps that they belong to."""

from __future__ import annotations

import contextlib
import glob
import itertools
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sedjax._reader import ReadError

Path = str | os.PathLike[str]
LARGEST_NORM = 1e36  # of a change: reports have norms in float32, of several changes together
# What shows that digits in a name are no whole number by themselves: a fraction, a power of ten, thousands set apart or
# as a letter or word; before them also 0x, or a sign, unless it only parts words.
_AFTER = re.compile(
  r"[.,']\d|[_ ]000(?!\d)|[eE][-+]?\d|[kKmMbBgGtT](?![a-zA-Z])|[kKMBGT](?=tok|step|iter|img)|mil(?!e)|thousand|billion"
)
_BEFORE = re.compile(r"(\d[.,']|\d[eE][-+]?|(?<!\d)0[xX]|(^|[\s_=/(])[-+])$")


class CheckpointError(ValueError):
  """A series of checkpoints cannot be analysed, or not to its end; the message names file, step and tensor."""


class Entry(NamedTuple):
  """One checkpoint of the series."""

  file: str
  step: int


def error_at(entry: Entry, tensor: str | None, why: str) -> CheckpointError:
  """The error that names file, step and tensor."""
  where = f", tensor {tensor!r}" if tensor is not None else ""
  return CheckpointError(f"sedjax analyze: {entry.file} (step {entry.step}){where}: {why}.")


def too_large(entry: Entry, tensor: str | None, since: str) -> CheckpointError:
  """The error of a change that reports cannot hold."""
  why = f"since {since} it changed by {LARGEST_NORM:g} or more, too much for reports in float32"
  return error_at(entry, tensor, why)


def steps_since(entry: Entry, step: int) -> int:
  """The steps in a row that ends with a checkpoint.

  Raises:
    CheckpointError: reports, which have int32, cannot count them.
  """
  if entry.step - step >= 2**31:
    why = f"a row of {entry.step - step} steps, from step {step} on, is longer than reports can count"
    raise error_at(entry, None, f"{why}; give steps in a larger unit")
  return entry.step - step


@contextlib.contextmanager
def about(entry: Entry, tensor: str | None = None) -> Iterator[None]:
  """Turns what reading raises into a CheckpointError that names file, step and tensor."""
  try:
    yield
  except ReadError as error:
    raise error_at(entry, tensor, str(error)) from error
  except OSError as error:
    raise error_at(entry, tensor, f"it cannot be read: {error.strerror or error}") from error


def find_series(files: Path | Iterable[Path], steps: Sequence[int] | None) -> list[Entry]:
  """The checkpoints by ascending step."""
  patterns = [os.fsdecode(file) for file in ([files] if isinstance(files, str | bytes | os.PathLike) else files)]
  found: list[str] = []
  for pattern in patterns:
    matching = [pattern] if os.path.exists(pattern) else sorted(_matching(pattern), key=_by_numbers)
    if not matching:
      if glob.has_magic(pattern):
        raise CheckpointError(f"sedjax analyze: no file matches {pattern!r}; quote the pattern and check the folder.")
      raise CheckpointError(f"sedjax analyze: there is no file {pattern!r}; check its name and folder.")
    found += matching
  if not found:
    raise CheckpointError("sedjax analyze: no file was given; give a pattern or the checkpoints' names.")
  if steps is None:
    numbers = _steps_from_names(found)
  else:
    try:
      numbers = [operator.index(step) for step in steps]
    except TypeError:
      raise CheckpointError(f"sedjax analyze: steps must be whole numbers, got {steps!r}.") from None
    if len(numbers) != len(found):
      raise CheckpointError(
        f"sedjax analyze: steps= has {len(numbers)} for {len(found)} checkpoints; give one for each."
      )
    for (file, step), (later, other) in itertools.pairwise(zip(found, numbers, strict=True)):
      if other <= step:
        raise CheckpointError(
          f"sedjax analyze: the given steps do not ascend: {file} has step {step}, {later} after it step {other}."
        )
  for file, step in zip(found, numbers, strict=True):
    if not -(2**63) <= step < 2**63:
      raise CheckpointError(f"sedjax analyze: {file} has the step {step}, which is no 64-bit number; give steps.")
  series = sorted((Entry(file, step) for file, step in zip(found, numbers, strict=True)), key=lambda entry: entry.step)
  for one, two in itertools.pairwise(series):
    if one.step == two.step:
      raise CheckpointError(f"sedjax analyze: {one.file} and {two.file} have the same step {one.step}; leave one out.")
    steps_since(two, one.step)
  return series


def _matching(pattern: str) -> list[str]:
  """The files that a pattern fits, whose folder, or all of it, may have brackets that stand for themselves."""
  folder, name = os.path.split(pattern)
  others = os.path.join(glob.escape(folder), name), pattern.replace("[", "[[]")
  return next(filter(None, (glob.glob(each, recursive=True) for each in (pattern, *others))), [])


def _by_numbers(file: str) -> list[str | int]:
  """Sorts step_9 before step_10, as steps that are given for a pattern's files expect."""
  return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", file))]


def _steps_from_names(files: list[str]) -> list[int]:
  """The number that varies over the names."""
  if len(files) == 1:
    numbers = re.findall(r"\d+", files[0])
    return [int(numbers[-1]) if numbers else 0]
  parts = [re.split(r"(\d+)", file) for file in files]
  other = next((i for i, part in enumerate(parts) if part[::2] != parts[0][::2]), None)
  if other is not None:
    raise CheckpointError(
      f"sedjax analyze: {files[0]} and {files[other]} differ in more than a number, so their steps are not known; "
      "narrow the pattern or give steps."
    )
  columns = {column for column in zip(*(tuple(map(int, part[1::2])) for part in parts), strict=True)}
  varying = [column for column in columns if len(set(column)) > 1]
  if not varying:
    raise CheckpointError(f"sedjax analyze: {files[0]} and {files[1]} have the same step; leave one out or give steps.")
  if len(varying) > 1:
    example = next(i for i in range(1, len(files)) if sum(column[i] != column[0] for column in varying) > 1 or i == 1)
    raise CheckpointError(
      f"sedjax analyze: several numbers vary over the names (as from {files[0]} to {files[example]}), so steps are not "
      "known; narrow the pattern, give the index or the folder of sharded checkpoints, or give steps."
    )
  steps = varying[0]
  places = [at for at in range(1, len(parts[0]), 2) if tuple(int(part[at]) for part in parts) == steps]
  unplain = [_unplain(files, parts, at) for at in places]
  if None not in unplain:
    raise CheckpointError(
      f"sedjax analyze: the steps in the names are not written as plain whole numbers ({unplain[0]}); give steps."
    )
  return list(steps)


def _unplain(files: list[str], parts: list[list[str]], at: int) -> str | None:
  """Of a number in the names, an example that is not a plain whole number; None where there is none."""
  for file, part in zip(files, parts, strict=True):
    before, after = _BEFORE.search("".join(part[:at])), _AFTER.match("".join(part[at + 1 :]))
    if before or after:
      return f"{before.group() if before else ''}{part[at]}{after.group() if after else ''} in {file}"
  return None
