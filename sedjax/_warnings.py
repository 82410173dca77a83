"""What in a record asks for caution: the warnings of the report's page."""

from __future__ import annotations

import math

import numpy as np

from sedjax import _null
from sedjax._html import listed, percent, row_steps_text, steps_text
from sedjax._summary import Facts
from sedjax._types import Status, explain
from sedjax._words import counted

_USUAL_MOMENTUM = 0.9


def warnings(facts: Facts) -> list[tuple[str, str]]:
  """What asks for caution, as (title, plain text), each only where its cause is there."""
  sums = facts.sums
  notes = []
  never = (sums.full == 0) & (sums.missing == 0)  # [seed, window, group]
  if never.any():
    some = "" if never.all(0)[never.any(0)].all() else " in some seeds"
    where = f"{_places(facts, never.any(0))}{some}"
    notes.append(("Window not full.", f"It never fills for {where}, so there is no edge to look for: the record is too "
                  "short, or the group has no updates."))  # fmt: skip
  memory = 1 / (1 - (facts.momentum or _USUAL_MOMENTUM))  # in steps
  if facts.row_steps is not None and facts.row_steps[1] < memory - 1e-6:
    known = f"its momentum {facts.momentum:g}" if facts.momentum else f"momentum, if it has {_USUAL_MOMENTUM:g}"
    notes.append((
      "Short rows.",
      f"A row sums {row_steps_text(facts.row_steps)}, and the optimizer, by {known}, looks back over about "
      f"{steps_text(math.ceil(memory - 1e-6))}: neighbouring rows are alike by that alone. A larger every= shows "
      "slower motion.",
    ))  # fmt: skip
  above, unsure = (int(part[facts.at].sum()) for part in (sums.above, sums.ambiguous))
  if unsure > 0.5 * above:
    notes.append((
      "Edge ambiguous.",
      f"In {percent(unsure, above)} of the windows that exceed noise another place’s ratio is within the sketch’s "
      "error of that at k*.",
    ))  # fmt: skip
  note = _momentum_note(facts)
  if note:
    notes.append(note)
  titles = {
    Status.BELOW_FLOOR: "Below float32’s floor.",
    Status.LOW_EFFECTIVE_DIM: "Effective dimension low.",
    Status.PARTIAL_ROW: "Rows of unequal length.",
    Status.NONFINITE_SKIPPED: "Steps skipped: not finite.",
    Status.ZERO_SKIPPED: "Steps skipped: zero updates.",
    Status.CANCELLATION: "Rounding.",
    Status.UNTRACKED: "Untracked leaves.",
    Status.UNKNOWN_GROUP: "Unknown group.",
    Status.MAP_CHANGED: "The map changed.",
  }
  for bit, title in titles.items():
    counts = sums.bits[..., int(bit).bit_length() - 1].sum(0)  # [window, group]
    if not counts.any():
      continue
    total = sums.rows * len(facts.seeds)
    here = int(counts[facts.place])
    where = f" In {percent(here, total)} of the reports of {facts.whole}." if here else ""
    if not here:
      where = f" Not in {facts.whole}, but in {_places(facts, counts > 0)}."
    elif len(facts.groups) > 1 and 1 < (counts > 0).sum() < counts.size:
      where = f"{where[:-1]}, and in {int((counts > 0).sum()) - 1} of the other windows and groups."
    skipped = {Status.NONFINITE_SKIPPED: "skipped_nonfinite", Status.ZERO_SKIPPED: "skipped_zero"}.get(bit)
    if skipped in facts.chosen and here:
      most = int(facts.chosen[skipped].values.max())
      where += f" {steps_text(most)} in all{' in the seed with the most' if len(facts.seeds) > 1 else ''}."
    if bit == Status.PARTIAL_ROW and facts.every is not None:
      where += f" What noise shows is that of rows of {steps_text(int(facts.every))}."
    if bit == Status.LOW_EFFECTIVE_DIM:
      lowest = sums.least_dim.min(0)
      where += f" The least is {lowest.min():,.0f}."
    notes.append((title, explain(int(bit)) + where))
  odd = sums.missing.sum(0)
  if odd.any():
    where = counted(int(odd.sum()), "report")
    notes.append(("Values missing.", f"The gap ratio or σ₁² share is NaN or infinite in {where}, for "
                  f"{_places(facts, odd > 0)}; these are left out."))  # fmt: skip
  unknown = sum(int(sums.bits[..., bit].sum() > 0) for bit in range(32) if 1 << bit >= 2 * max(Status))
  if unknown:
    notes.append(("Unknown status.", "Reports carry status bits that this version of sedjax does not know."))
  return notes


def _places(facts: Facts, mask: np.ndarray) -> str:
  """Plain text: which windows of which groups."""
  if mask.all() and mask.size > 1:
    return "any window of any group"
  found = []
  for w, window in enumerate(facts.windows):
    names = [group for g, group in enumerate(facts.groups) if mask[w, g]]
    if len(names) == len(facts.groups):
      found.append(f"window {window}")
    elif names:
      found.append(f"window {window} of {listed(names, 4)}")
  return listed(found, 4)


def _momentum_note(facts: Facts) -> tuple[str, str] | None:
  """Where noise of an optimizer's momentum accounts for what is seen; None where it does not."""
  full = facts.filled
  every, momentum = int(facts.every or 1), facts.momentum or 0.0
  if not full.any() or not 0 <= momentum < 1 or not facts.alike:  # rows of other lengths show other noise
    return None
  if momentum and "pc1_fraction" in facts.chosen:
    values = np.linalg.eigvalsh(_null.row_covariance(facts.window, momentum, every))
    expected = float(values[-1] / values.sum())
    seen = float(np.median(facts.chosen["pc1_fraction"].values[:, :, 0, 0][full]))
    if expected > 1.5 / facts.window and seen < 1.1 * expected:
      return (
        "Momentum explains PC1.",
        f"σ₁² has a share of {percent(seen)} in the median window, and noise with momentum {momentum:g} in rows of "
        f"{steps_text(every)} already has {percent(expected)}.",
      )
  if not momentum:
    grid, means, deviations = _null.noise_ratios(facts.window, _USUAL_MOMENTUM, every)
    limits = means + _null.ENTER * deviations
    dims = facts.chosen["effective_dim"].values[:, :, 0, 0] if "effective_dim" in facts.chosen else np.full(
      facts.gap.shape, 2.0 ** grid[-1])  # fmt: skip
    logs = np.log2(np.maximum(dims, 1))
    edges = full & (facts.gap > facts.null)
    doubtful = np.zeros_like(edges)
    for k in np.unique(facts.k_star[edges]):
      limit = np.exp(np.interp(logs, grid, limits[:, k - 1]))
      doubtful |= edges & (facts.k_star == k) & (facts.gap <= limit)
    if doubtful.sum() > 0.5 * edges.sum() > 0:
      said = "records momentum 0" if facts.momentum == 0 else "does not record the optimizer’s momentum"
      return (
        "Momentum may explain the edge.",
        f"The record {said}. If the optimizer has momentum {_USUAL_MOMENTUM:g}, noise shows as much in "
        f"{percent(doubtful.sum(), edges.sum())} of the windows that are counted as edges: pass momentum= to the "
        "tracker.",
      )
  return None
