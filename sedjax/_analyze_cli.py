"""The subcommand `sedjax analyze`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Any

from sedjax._dataset import storable

# Of a sketch: 64 MiB a row. The error of a ratio falls as 1/√d, and is then 0.024 %.
_LARGEST_DIM = 2**24

DESCRIPTION = "Computes singular values, spectral edge and phases from a series of checkpoints, one tensor at a time."
EPILOG = """
examples:
  sedjax analyze 'run/step_*/model.safetensors' -o run.nc
  sedjax analyze 'run/checkpoint-*' -o run.nc --window 5,10 --group 'attention=attn' --leave-out 'wpe|ln_'

The same command goes on where an earlier one was interrupted. A record of the same checkpoints is replaced, and keeps
the series and events that were added to it; no other file is. Checkpoints are safetensors files, index files of sharded
ones, folders that Hugging Face or orbax saved, PyTorch files (which are never executed), or npz files. All is computed
on the CPU, so that GPUs and TPUs stay free for others, unless JAX_PLATFORMS is set.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Describes the subcommand and its arguments."""
  parser.description, parser.epilog = DESCRIPTION, EPILOG
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  add = parser.add_argument
  add("files", nargs="+", help="checkpoints, or patterns of them in quotes; the number that varies is the step")
  add("-o", "--out", required=True, metavar="RUN.nc", help="the record to write")
  add("--window", default="10", help="rows in the window, one size or several: 10 or 5,10,20 (default: 10)")
  add("--sketch", default="count:16384", help="count:DIM, gaussian:DIM or exact (default: count:16384)")
  add("--seed", type=int, default=0, help="of the sketch (default: 0)")
  add("--momentum", type=float, default=0.0, help="beta_1 of the optimizer, for what noise would show (default: 0)")
  add("--every", type=int, help="optimizer steps between checkpoints (default: the most frequent distance)")
  add("--k-max", type=int, help="last place where an edge is looked for (default: half of each window)")
  add("--steps", help="steps of the files, separated by commas (default: from the names)")
  add(
    "--group",
    action="append",
    default=[],
    metavar="NAME=REGEX",
    help="a group of parameters by a regular expression for their paths; may be repeated, the first that fits counts",
  )
  add("--leave-out", metavar="REGEX", help="parameters that are not tracked, by their paths")
  add(
    "--rename",
    action="append",
    default=[],
    metavar="REGEX=TEXT",
    help="changes paths, as where a PyTorch model is compared with a flax model: 'weight$=kernel'",
  )
  add("--transpose", metavar="REGEX", help="tensors, by their changed paths, that have PyTorch's order (out, in, …)")


def _configure_jax() -> None:
  """Computes on the CPU, unless `JAX_PLATFORMS` says otherwise, and there in the thread that asks for it.

  JAX takes hold of each device that it finds, of TPUs whole, of GPUs with three quarters of their memory, although
  another program may train there. On the CPU it would hand each tensor to a thread of its own, in vain, since the one
  that has just read it, and has it in its core's cache, waits for the result.
  """
  import jax

  if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_cpu_enable_async_dispatch", False)


def run(args: argparse.Namespace) -> int:
  """Runs the subcommand; returns the exit code."""
  _configure_jax()
  from sedjax import checkpoints

  record = checkpoints.analyze(args.files, out=args.out, **options(args))
  print(f"wrote {storable(args.out)}: {record.sizes['step']} rows")
  return 0


def options(args: argparse.Namespace) -> dict[str, Any]:
  """The keyword arguments of `analyze`.

  Raises:
    ValueError: a value cannot be read.
  """
  windows = _integers("--window", args.window)
  groups: list[tuple[str, str | None]] = []
  if args.leave_out is not None:
    groups.append((_pattern("--leave-out", args.leave_out), None))
  groups += [(_pattern("--group", pattern), name) for name, pattern in (_pair("--group", text) for text in args.group)]
  if args.leave_out is not None and not args.group:
    groups.append(("", "kept"))
  return {
    "window": windows[0] if len(windows) == 1 else windows,
    "every": args.every,
    "k_max": args.k_max,
    "sketch": _sketch(args.sketch, args.seed),
    "groups": _once("--leave-out and --group", groups) or None,
    "momentum": args.momentum,
    "steps": None if args.steps is None else _integers("--steps", args.steps),
    "rename": _once("--rename", [_pair("--rename", text, str.rpartition) for text in args.rename]) or None,
    "transpose": args.transpose,
  }


def _integers(name: str, text: str) -> tuple[int, ...]:
  try:
    return tuple(int(part) for part in text.split(","))
  except ValueError:
    raise ValueError(f"sedjax analyze: {name} must be whole numbers separated by commas, got {text!r}.") from None


def _pair(name: str, text: str, split: Callable[[str, str], tuple[str, str, str]] = str.partition) -> tuple[str, str]:
  before, sign, after = split(text, "=")
  if not before or not sign:
    raise ValueError(f"sedjax analyze: {name} must have the form A=B, got {text!r}.")
  return before, after


def _once(name: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The pairs as a dict, which would keep only the last one of a key."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"sedjax analyze: {name} must name a pattern once, got {twice!r} twice; leave one out.")
  return found


def _pattern(name: str, text: str) -> str:
  """A regular expression, which is not empty: that would be found in every path."""
  try:
    re.compile(text)
  except re.error as error:
    raise ValueError(f"sedjax analyze: {name} must be a regular expression, got {text!r} ({error}).") from None
  if not text:
    raise ValueError(f"sedjax analyze: {name} must not be empty, as all paths have that; give '.' to mean all.")
  return text


def _sketch(text: str, seed: int) -> Any:
  from sedjax import sketch

  kind, _, dim = text.partition(":")
  if kind == "exact" and not dim:
    return sketch.exact()
  if kind not in ("count", "gaussian") or not (dim.isdecimal() or not dim):
    raise ValueError(f"sedjax analyze: --sketch must be count:DIM, gaussian:DIM or exact, got {text!r}.")
  if dim and (len(dim) > 9 or not 1 <= int(dim) <= _LARGEST_DIM):
    raise ValueError(
      f"sedjax analyze: the dimension of --sketch must be from 1 to {_LARGEST_DIM:,}, got {text!r}; what needs more is "
      "--sketch exact."
    )
  make = {"count": sketch.count, "gaussian": sketch.gaussian}[kind]
  return make(int(dim), seed=seed) if dim else make(seed=seed)
