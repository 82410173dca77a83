"""Timings that can be compared: every candidate in turn, in one loop, each waited for."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Call = Callable[[int], Any]  # of the round's number; returns what to wait for


class Compiled(NamedTuple):
  """A compiled function, and what compiling it took."""

  call: Any
  seconds: float  # trace, lower and compile, with nothing cached
  temporaries: int | None  # bytes beside arguments and results; None where the backend does not tell

  def facts(self) -> dict[str, Any]:
    return {"compile_s": self.seconds, "temporary_bytes": self.temporaries}


def compile_function(function: Callable[..., Any], *args: Any, **options: Any) -> Compiled:
  """Compiles `function` for arguments like `args`; `options` are those of `jax.jit`."""
  jax.clear_caches()
  start = time.perf_counter()
  call = jax.jit(function, **options).lower(*args).compile()
  seconds = time.perf_counter() - start
  memory = call.memory_analysis()
  return Compiled(call, seconds, None if memory is None else memory.temp_size_in_bytes)


def seconds_of(call: Call, i: int) -> float:
  """How long one call takes, until its result is there."""
  start = time.perf_counter()
  jax.block_until_ready(call(i))
  return time.perf_counter() - start


def interleave(
  calls: Mapping[str, Call],
  rounds: int,
  repeats: int,
  warm: int = 2,
  budget: float = math.inf,
  restart: Callable[[], None] | None = None,
) -> dict[str, dict[str, Any]]:
  """Times all calls in turn, `rounds` times, and all of that `repeats` times.

  Args:
    calls: by name; each round begins with another one.
    rounds: timings of each call that make one median.
    repeats: medians of each call.
    warm: rounds at the beginning of each repeat that do not count.
    budget: seconds after which a repeat ends early, with three rounds or more.
    restart: called before each repeat.

  Returns:
    For each call the medians in seconds, the best of them, and how many timings made each median.
  """
  names = list(calls)
  medians: dict[str, list[float]] = {name: [] for name in names}
  counts = []
  for _ in range(repeats):
    if restart is not None:
      restart()
    found: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    for i in range(warm + rounds):
      turn = i % len(names)
      for name in names[turn:] + names[:turn]:
        seconds = seconds_of(calls[name], i)
        if i >= warm:
          found[name].append(seconds)
      if i - warm >= min(rounds, 3) - 1 and time.perf_counter() > end:
        break
    counts.append(len(found[names[0]]))
    for name in names:
      medians[name].append(statistics.median(found[name]))
  return {name: {"medians_s": medians[name], "best_s": min(medians[name]), "rounds": counts} for name in names}
