"""The report: one self-contained page that says in words what a record holds, with pictures beside.

The record is read once, in blocks of steps: what the tables of all groups and windows need is summed up on the way, and
only the chosen window of the chosen group is kept for the pictures.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sedjax import _null, plot, record
from sedjax._page_style import GLOSSARY, STYLE
from sedjax._types import Phase, Report, Status, explain

if TYPE_CHECKING:
  import xarray as xr

_BLOCK = 2**22  # numbers of one field that are read at a time
_MANY_SPANS, _MANY_SEEDS = 12, 16
_VECTORS = ("singular_values", "ratios")
_USUAL_MOMENTUM = 0.9
_NEEDED = ("gap_ratio", "null_ratio", "k_star", "phase", "status")
_LONGEST = 50_000  # characters of an attribute
_FIGURE_SIZES = ((8.4, 3.7), (4.1, 4.1))  # inches, for wide and for narrow screens


class Span(NamedTuple):
  """Rows that follow each other in one phase."""

  phase: int
  first: int  # the step of its first row
  last: int  # the step of its last row
  until: int | None  # the first step of the next span; None for the last span
  peak: float  # the greatest gap ratio in it

  @property
  def steps(self) -> int:
    return (self.last if self.until is None else self.until) - self.first


class Sums(NamedTuple):
  """Of every [seed, window, group]: what the tables say."""

  rows: int
  full: np.ndarray  # rows with a full window
  above: np.ndarray  # of these, rows whose ratio exceeds what noise shows
  ambiguous: np.ndarray  # of those above, rows whose k* is ambiguous: within noise k* means nothing
  log_ratio: np.ndarray  # sum of log gap ratio
  pc1: np.ndarray  # sum of shares
  peak: np.ndarray  # the greatest gap ratio
  peak_step: np.ndarray
  places: np.ndarray  # [..., K]: those above, by k*
  bits: np.ndarray  # [..., 32]: rows by status bit
  last_phase: np.ndarray
  missing: np.ndarray  # rows in which a number is NaN or infinite
  least_dim: np.ndarray  # the least effective dimension, infinite where there is none


def open_record(path: str | os.PathLike[str]) -> xr.Dataset:
  """`record.open_record`, of a record that has what a page needs; it raises ValueError where that lacks."""
  found = record.open_record(os.fspath(path))
  check_record(found, os.fspath(path))
  return found


def check_record(found: xr.Dataset, name: str) -> None:
  """Raises ValueError, naming what is wrong, for what is no record."""
  lacking = [key for key in record.DIMS if key not in found.dims or key not in found.coords]
  lacking += [key for key in _NEEDED if key not in found.data_vars]
  if lacking:
    raise ValueError(f"{name} is no record of sedjax: it lacks {', '.join(lacking)}.")
  if not all(found.sizes[dim] for dim in record.DIMS):
    raise ValueError(f"{name} holds no rows.")


def write_page(
  source: xr.Dataset, out: str | os.PathLike[str], *, name: str = "record", window: int | None = None, group: Any = None
) -> None:
  """Writes the page of a record; the file appears whole or not at all."""
  target = Path(out)
  # Made first, so that a place that cannot be written to is named before the record is read.
  handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
  try:
    with os.fdopen(handle, "w", encoding="utf-8") as file:
      file.write(make_page(source, name=name, window=window, group=group))
    os.chmod(temporary, 0o644)
    os.replace(temporary, target)
  except BaseException:
    os.unlink(temporary)
    raise


def make_page(source: xr.Dataset, *, name: str = "record", window: int | None = None, group: Any = None) -> str:
  """The page of a record, as HTML.

  Args:
    source: the record, lazily opened or in memory.
    name: what the page calls it.
    window: the window of the text and pictures; None for the largest. Tables have all.
    group: likewise; None for the whole model.

  Raises:
    ValueError: it is no record, or has no such window or group.
    ImportError: matplotlib is missing.
  """
  plot.load_matplotlib()  # before minutes of reading
  check_record(source, name)
  windows, groups = source.window.values.tolist(), source.group.values.tolist()
  window = max(windows) if window is None else window
  if group is None:
    group = record.WHOLE if record.WHOLE in groups else groups[0]
  for what, label, labels in (("window", window, windows), ("group", group, groups)):
    if label not in labels:
      raise ValueError(f"The record has no {what} {label!r}; it has {', '.join(map(str, labels))}.")
  place = windows.index(window), groups.index(group)
  return _Page(source, name, window, group, place, *_read(source, *place)).text()


def _read(source: xr.Dataset, w: int, g: int) -> tuple[Sums, xr.Dataset, xr.Dataset, xr.Dataset]:
  """One pass over the file.

  Returns:
    The sums; the chosen window and group without vectors; the same of the first seed with them; three fields of the
    chosen window in all groups, of the first seed.
  """
  import xarray as xr

  rows, *shape = (source.sizes[dim] for dim in record.DIMS)
  steps = source.step.values
  k_max = int(max(source.window.values))

  def zeros(*more: int) -> np.ndarray:
    return np.zeros((*shape, *more), np.int64)

  full, above, ambiguous, peak_step, places, bits, missing = (
    zeros(), zeros(), zeros(), zeros(), zeros(k_max + 1), zeros(32), zeros()
  )  # fmt: skip
  log_ratio, pc1, peak = np.zeros(shape), np.zeros(shape), np.zeros(shape)
  least_dim = np.full(shape, np.inf)
  last_phase = zeros()
  scalars = [name for name in Report._fields if name in source.data_vars and name not in _VECTORS]
  vectors = [name for name in _VECTORS if name in source.data_vars]
  kept: dict[str, list[np.ndarray]] = {name: [] for name in scalars + vectors}
  over_groups: dict[str, list[np.ndarray]] = {"gap_ratio": [], "null_ratio": [], "phase": []}
  summed = {*_NEEDED, "edge_ambiguous", "pc1_fraction", "effective_dim"}
  size = max(1, _BLOCK // max(1, math.prod(shape)))
  for start in range(0, rows, size):
    part = source.isel(step=slice(start, start + size))
    block: dict[str, np.ndarray] = {}
    for name in scalars:
      if name in summed:
        block[name] = part[name].transpose(*record.DIMS).values
        kept[name].append(block[name][:, :, w, g].copy())
      else:
        kept[name].append(part[name].transpose(*record.DIMS)[:, :, w, g].values)
    for name in vectors:  # the first seed's alone: pictures of the spectrum have one seed
      kept[name].append(part[name].transpose(*record.DIMS, "index")[:, :1, w, g].values)
    for name, found in over_groups.items():
      found.append(block[name][:, :1, w].copy())
    gap, null, k_star = block["gap_ratio"], block["null_ratio"], block["k_star"]
    sound = np.isfinite(gap)
    filled = (k_star > 0) & sound
    full += filled.sum(0)
    edge = filled & (gap > null)
    above += edge.sum(0)
    missing += (~sound).sum(0)
    log_ratio += np.log(np.where(filled & (gap > 0), gap, 1), dtype=np.float32).sum(0, dtype=float)
    for k in range(1, min(k_max, int(k_star.max(initial=0))) + 1):
      places[..., k] += (edge & (k_star == k)).sum(0)
    if "edge_ambiguous" in block:
      ambiguous += (edge & (block["edge_ambiguous"] > 0)).sum(0)
    if "pc1_fraction" in block:
      pc1 += np.where(filled, np.nan_to_num(block["pc1_fraction"]), 0).sum(0, dtype=float)
    if "effective_dim" in block:
      dims = block["effective_dim"]
      least_dim = np.minimum(least_dim, np.where(dims > 0, dims, np.inf).min(0))
    at = np.where(filled, gap, 0).argmax(0)[None]
    top = np.take_along_axis(np.where(filled, gap, 0), at, 0)[0]
    peak_step = np.where(top > peak, steps[start + at[0]], peak_step)
    peak = np.maximum(peak, top)
    status = block["status"].astype(np.int64, copy=False)
    present = int(np.bitwise_or.reduce(status, axis=None))
    for bit in range(32):
      if present >> bit & 1:
        bits[..., bit] += (status >> bit & 1).sum(0)
    last_phase = block["phase"][-1].astype(int)

  def joined(name: str, parts: list[np.ndarray]) -> tuple[Any, np.ndarray, dict[str, Any]]:
    whole = np.concatenate(parts)
    dims = (*record.DIMS, "index") if name in _VECTORS else record.DIMS
    return dims, np.expand_dims(whole, (2, 3)), dict(source[name].attrs)

  coords = {"step": source.step, "seed": source.seed, "window": source.window[[w]], "group": source.group[[g]]}
  extra = {
    name: source[name].load() for name in [*plot.series_names(source), *(["event"] if "event" in source else [])]
  }
  chosen = xr.Dataset({name: joined(name, parts) for name, parts in kept.items() if name in scalars}, coords)
  chosen = chosen.assign(extra).assign_attrs(source.attrs)
  first = chosen.isel(seed=[0]).assign({name: joined(name, kept[name]) for name in vectors})
  by_group = xr.Dataset(
    {
      name: (record.DIMS, np.concatenate(parts)[:, :, None], dict(source[name].attrs))
      for name, parts in over_groups.items()
    },
    {**coords, "seed": source.seed[:1], "group": source.group},
  )
  sums = Sums(
    rows, full, above, ambiguous, log_ratio, pc1, peak, peak_step, places, bits, last_phase, missing, least_dim
  )
  return sums, chosen, first, by_group


def spans_of(steps: np.ndarray, phases: np.ndarray, gaps: np.ndarray) -> list[Span]:
  """The phases that followed each other."""
  starts = np.flatnonzero(np.diff(phases, prepend=-1))
  ends = [*(starts[1:] - 1), len(phases) - 1]
  peaks = np.fmax.reduceat(gaps, starts)
  return [
    Span(int(phases[a]), int(steps[a]), int(steps[b]), int(steps[b + 1]) if b + 1 < len(steps) else None, float(peak))
    for a, b, peak in zip(starts, ends, peaks, strict=True)
  ]


def _e(text: Any) -> str:
  return html.escape(str(text), quote=True)


def _number(value: float, digits: int = 3) -> str:
  """A number as a reader would write it."""
  if not math.isfinite(value):
    return "–"
  if float(value).is_integer() and abs(value) < 1e9:
    return f"{int(value):,}"
  return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 10**digits or abs(value) >= 1e9 else f"{value:,.0f}" if abs(
    value) >= 1 else f"{value:.1e}"  # fmt: skip


def _percent(part: float, whole: float = 1) -> str:
  """Never "0\u00a0%" or "100 %" of what is neither."""
  if whole <= 0:
    return "–"
  share = 100 * part / whole
  if 0 < share < 1:
    return "under 1\u00a0%"
  return "over 99\u00a0%" if 99 < share < 100 else f"{share:.0f}\u00a0%"


def _steps(count: int) -> str:
  return f"{count:,} step{'' if count == 1 else 's'}"


def _list(items: Sequence[str], most: int = 8) -> str:
  items = [*items[:most], f"{len(items) - most} more"] if len(items) > most else list(items)
  return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _all(seeds: int) -> str:
  return "both seeds" if seeds == 2 else f"all {seeds} seeds"


def _between(steps: Sequence[int]) -> str:
  low, high = min(steps), max(steps)
  return f"at step {low:,}" if low == high else f"between steps {low:,} and {high:,}"


_PHASE_WORDS = {
  Phase.WARMUP: "the window fills",
  Phase.NO_EDGE: "no edge",
  Phase.RISE: "a rise",
  Phase.PLATEAU: "a plateau",
  Phase.COLLAPSE: "a collapse",
}
_PHASE_NAMES = {phase: name for phase, (_, _, name) in plot.PHASES.items()}


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
  """A table in a box of its own that scrolls; cells are HTML. The first `left` columns hold words, others numbers."""
  head = "".join(f'<th scope="col"{"" if i < left else " class=n"}>{title}</th>' for i, title in enumerate(heads))
  body = "".join(
    "<tr>"
    + "".join(
      f'<th scope="row">{cell}</th>' if i == 0 else f"<td{'' if i < left else ' class=n'}>{cell}</td>"
      for i, cell in enumerate(row)
    )
    + "</tr>\n"
    for row in rows
  )
  label = _e(caption)
  return (
    f'<div class="box"><p class="caption">{label}</p><div class="scroll" tabindex="0" role="region" '
    f'aria-label="{label}"><table aria-label="{label}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'
    "</div></div>"
  )


def _figure(draw: Callable[[Any], Any], alt: str, caption: str) -> str:
  """Two pictures, for wide and for narrow screens, in the page itself."""
  from matplotlib.figure import Figure

  matplotlib = plot.load_matplotlib()
  uris = []
  for size in _FIGURE_SIZES:
    with matplotlib.rc_context({"font.size": 9.5, "axes.linewidth": 0.7, "savefig.dpi": 170}):
      figure = Figure(size, layout="constrained")
      draw(figure.subplots())
      file = io.BytesIO()
      figure.savefig(file, format="png", metadata={"Software": None})
    uris.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
  wide, narrow = _FIGURE_SIZES
  return (
    f'<figure><picture><source media="(max-width: 560px)" srcset="{uris[1]}" width="{int(narrow[0] * 170)}" '
    f'height="{int(narrow[1] * 170)}"><img src="{uris[0]}" width="{int(wide[0] * 170)}" height="{int(wide[1] * 170)}" '
    f'alt="{_e(alt)}"></picture><figcaption>{_e(caption)}</figcaption></figure>'
  )


class _Page:
  """Holds what was read while the text is made; every method returns HTML unless it says so."""

  def __init__(
    self,
    source: xr.Dataset,
    name: str,
    window: int,
    group: Any,
    place: tuple[int, int],
    sums: Sums,
    chosen: xr.Dataset,
    first: xr.Dataset,
    by_group: xr.Dataset,
  ) -> None:
    self.name, self.window, self.group, self.sums = name, window, group, sums
    self.chosen, self.first, self.by_group, self.place = chosen, first, by_group, place
    self.attrs = source.attrs
    self.seeds = [str(seed) for seed in source.seed.values.tolist()]
    self.windows, self.groups = source.window.values.tolist(), [str(label) for label in source.group.values.tolist()]
    self.steps = source.step.values
    self.every = self._attr("every")
    self.momentum = self._attr("momentum")
    self.whole = "the whole model" if group == record.WHOLE else f"group “{group}”"

    def field(key: str) -> np.ndarray:  # [step, seed]
      return chosen[key].values[:, :, 0, 0]

    self.phase, self.gap, self.null = field("phase"), field("gap_ratio"), field("null_ratio")
    self.k_star = field("k_star")
    self.filled = (self.k_star > 0) & np.isfinite(self.gap)
    shown = np.where(self.filled, self.gap, np.nan)
    self.spans = [spans_of(self.steps, self.phase[:, i], shown[:, i]) for i in range(len(self.seeds))]
    self.at = (slice(None), *place)  # of sums: the chosen window and group, all seeds

  def _attr(self, key: str) -> float | None:
    """An attribute that is one number, else None."""
    try:
      return float(np.asarray(self.attrs[key]))
    except (KeyError, TypeError, ValueError):
      return None

  def text(self) -> str:
    notes = self.warnings()
    title = f"What happened in {self.name}"
    parts = [
      self.summary(),
      self.warning_box(notes),
      self.phase_section(),
      self.edge_section(),
      self.spectrum_section(),
      self.series_section(),
      self.group_section(),
      self.fidelity_section(),
      self.provenance_section(),
      GLOSSARY,
    ]
    body = "\n".join(part for part in parts if part)
    return (
      '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      # The page asks no host for anything, and a browser is told to see to it.
      '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
      "style-src 'unsafe-inline'\">\n"
      f'<link rel="icon" href="data:,">\n<title>{_e(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
      f"<main>\n<h1>{_e(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )

  # In words.

  def summary(self) -> str:
    return f'<div class="lead">{"".join(f"<p>{_e(sentence)}</p>" for sentence in self.headlines())}</div>'

  def headlines(self) -> list[str]:
    """Plain text."""
    count, rows = len(self.seeds), len(self.steps)
    who = f"{count} seeds" if count > 1 else "One run"
    span = f"steps {self.steps[0]:,} to {self.steps[-1]:,}" if rows > 1 else f"step {self.steps[0]:,} alone"
    of = f" of {_steps(int(self.every))} each" if self.every else ""
    said = [
      f"{who}, {span}, {rows:,} report{'s' * (rows > 1)}. The text is about {self.whole} in windows of {self.window} "
      f"rows{of}; tables have all groups and windows."
    ]
    if not self.filled.any():
      return [*said, "The window is never full, so nothing can be said about an edge."]
    first = [[span.first for span in spans if span.phase == Phase.RISE] for spans in self.spans]
    risen = [steps[0] for steps in first if steps]
    any_edge = [any(span.phase > Phase.NO_EDGE for span in spans) for spans in self.spans]
    if not any(any_edge):
      said.append("No edge is seen: the gap ratio never leaves what noise of the same momentum shows.")
    elif risen:
      where = f" in {_all(count)}" if len(risen) == count > 1 else f" in {len(risen)} of {count} seeds" if (
        count > 1) else ""  # fmt: skip
      word = "first rises" if max(map(len, first)) > 1 else "rises"
      said.append(f"An edge {word} {_between(risen)}{where}.")
    else:
      said.append("An edge is there from the first report on.")
    said.append(self.edge_sentence())
    ends = [int(phase) for phase in self.sums.last_phase[self.at]]
    kinds = [
      f"{_PHASE_NAMES[Phase(p)]}{f' in {ends.count(p)}' if len(set(ends)) > 1 else ''}" for p in sorted(set(ends))
    ]
    said.append(f"At the end, step {self.steps[-1]:,}: {_list(kinds)}.")
    return said

  def edge_sentence(self) -> str:
    """Plain text."""
    sums = self.sums
    full, above, unsure = (int(part[self.at].sum()) for part in (sums.full, sums.above, sums.ambiguous))
    places = sums.places[self.at].sum(0)
    k = int(places.argmax())
    if not above:
      return f"The gap ratio exceeds what noise shows in none of {full:,} full windows."
    return (
      f"The gap ratio exceeds what noise shows in {_percent(above, full)} of full windows. There k* is {k} in "
      f"{_percent(places[k], above)}, and ambiguous in {_percent(unsure, above)}."
    )

  def seed_words(self, spans: list[Span]) -> str:
    """One seed's phases, as plain text."""
    if len(spans) > _MANY_SPANS:
      longest = sorted(sorted(spans, key=lambda span: -span.steps)[:3])
      told = [f"{_PHASE_WORDS[Phase(s.phase)]} from step {s.first:,} for {_steps(s.steps)}" for s in
              sorted(longest, key=lambda span: span.first)]  # fmt: skip
      rises = [span.first for span in spans if span.phase == Phase.RISE]
      begins = f" The first of {len(rises)} rises begins at step {rises[0]:,}." if rises else ""
      return f"The phase changes {len(spans) - 1:,} times. Longest: {_list(told)}.{begins}"
    told = [f"{_PHASE_WORDS[Phase(span.phase)]} from step {span.first:,}" for span in spans]
    words = ", then ".join(told)
    return f"{words[0].upper()}{words[1:]}, until the record ends at step {spans[-1].last:,}."

  # Sections.

  def phase_section(self) -> str:
    shown = self.seeds[:_MANY_SEEDS]
    items = "".join(
      f"<li>{f'<b>Seed {_e(seed)}.</b> ' if len(self.seeds) > 1 else ''}{_e(self.seed_words(spans))}</li>"
      for seed, spans in zip(shown, self.spans, strict=False)
    )
    rest = len(self.seeds) - len(shown)
    more = f"<p>{rest} more seeds are in the tables of groups and windows.</p>" if rest else ""
    rows, left_out, most = [], 0, max(4, 3 * _MANY_SPANS // len(shown))
    for seed, spans in zip(shown, self.spans, strict=False):
      kept = sorted(spans, key=lambda span: -span.steps)[:most]
      left_out += len(spans) - len(kept)
      for span in sorted(kept, key=lambda span: span.first):
        lasts = _steps(span.steps) + (" so far" if span.until is None else "")
        rows.append([_e(seed), _e(_PHASE_NAMES[Phase(span.phase)]), f"{span.first:,}", lasts,
                     _number(span.peak)])  # fmt: skip
    table = _table(
      "Phases, with their first step and how long they last", ["Seed", "Phase", "First step", "Lasts", "Highest ratio"],
      rows, left=2,
    )  # fmt: skip
    cut = f"<p>{left_out:,} shorter spans are not listed.</p>" if left_out else ""
    picture = _figure(
      lambda ax: plot.gap_ratio(self.chosen, ax=ax),
      f"Gap ratio over optimizer steps with phases shaded. {' '.join(self.headlines()[1:2])}",
      f"The ratio at k* of {self.whole}. Each point is drawn where its window ends and looks back {self.looks_back()}. "
      "The dotted line is what noise seldom exceeds.",
    )
    return f"<h2>Phases</h2>{picture}<ul>{items}</ul>{more}{self.agreement()}{table}{cut}"

  def looks_back(self) -> str:
    """Plain text."""
    return _steps(int(self.window * self.every)) if self.every else f"{self.window} rows"

  def agreement(self) -> str:
    if len(self.seeds) < 2:
      return ""
    full = self.filled.all(1)
    if not full.any():
      return "<h3>Do the seeds agree?</h3><p>That cannot be said: there is no step at which all windows are full.</p>"
    same_phase = (self.phase == self.phase[:, :1]).all(1)[full].mean()
    edges = full & (self.gap > self.null).all(1)
    who = _all(len(self.seeds)).capitalize()
    lines = [f"{who} are in one phase in {_percent(same_phase)} of the reports with full windows."]
    if edges.any():
      same_k = (self.k_star == self.k_star[:, :1]).all(1)[edges].mean()
      lines.append(f"Where all exceed noise, they agree on k* in {_percent(same_k)}.")
    for phase in (Phase.RISE, Phase.PLATEAU, Phase.COLLAPSE):
      firsts = [next((s.first for s in spans if s.phase == phase), None) for spans in self.spans]
      found = [step for step in firsts if step is not None]
      if found:
        some = "all seeds" if len(found) == len(firsts) else f"{len(found)} of {len(firsts)} seeds"
        lines.append(f"The first {_PHASE_NAMES[phase]} begins {_between(found)} ({some}).")
    return f"<h3>Do the seeds agree?</h3><p>{_e(' '.join(lines))}</p>"

  def edge_section(self) -> str:
    if not self.filled.any():
      return "<h2>The edge, and how sure it is</h2><p>The window is never full: there is no edge to speak of.</p>"
    sums = self.sums
    best = int(sums.peak[self.at].argmax())
    peak, step = float(sums.peak[self.at][best]), int(sums.peak_step[self.at][best])
    row = int(np.searchsorted(self.steps, step))
    seed = f" (seed {self.seeds[best]})" if len(self.seeds) > 1 else ""
    dim = float(sums.least_dim[self.at].min())
    sure = [
      self.edge_sentence(),
      f"The highest ratio is {_number(peak)} at step {step:,}{seed}, where noise seldom exceeds "
      f"{_number(float(self.null[row, best]))}.",
    ]
    if self.exact():
      sure.append("The sketch is exact, so ratios have no sampling error.")
    elif math.isfinite(dim):
      error = _number(100 / math.sqrt(max(dim, 1)), 2)
      sure.append(
        f"Ratios have a standard error of {error}\u00a0% or less (√(1/d), with an effective dimension d of at least "
        f"{dim:,.0f})."
      )
    places = sums.places[self.at].sum(0)
    if np.count_nonzero(places) > 1:
      shares = [f"{k} in {_percent(places[k], places.sum())}" for k in np.argsort(-places)[:4] if places[k]]
      sure.append(f"Places of k* above noise: {_list(shares)}.")
    pictures = ""
    if "ratios" in self.first:
      pictures += _figure(
        lambda ax: plot.ratios(self.first, ax=ax),
        f"Heat map of all consecutive ratios over time with k* marked. {self.edge_sentence()}",
        f"All ratios σ_k/σ_(k+1){self.of_first()}: the darker, the larger. Squares mark k* where it is clear, circles "
        "where it is ambiguous.",
      )
    pictures += _figure(
      lambda ax: plot.against_null(self.chosen, ax=ax),
      f"Gap ratio divided by what noise shows, over time; highest ratio {_number(peak)} at step {step:,}.",
      "The live ratio divided by what noise with the recorded momentum, seen through the same sketch, seldom exceeds.",
    )
    return (
      f"<h2>The edge, and how sure it is</h2><p>{_e(' '.join(sure))}</p>{pictures}<h3>What stayed ambiguous</h3>"
      f"<p>{_e(self.ambiguity())}</p>"
    )

  def ambiguity(self) -> str:
    """Plain text."""
    if "edge_ambiguous" not in self.chosen:
      return "The record does not say."
    unsure = (self.chosen["edge_ambiguous"].values[:, :, 0, 0] > 0) & self.filled
    if not unsure.any():
      return "Nothing: in every full window k* stands out from all other places by more than the sketch’s error."
    longest = (0, 0, 0)
    for i in range(unsure.shape[1]):
      edges = np.flatnonzero(np.diff(unsure[:, i].astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
      if len(edges):
        a, b = edges[(edges[:, 1] - edges[:, 0]).argmax()]
        longest = max(longest, (int(b - a), int(a), i))
    rows, a, i = longest
    seed = f" (seed {self.seeds[i]})" if len(self.seeds) > 1 else ""
    quiet = (unsure & (self.gap <= self.null)).sum()
    first, last = int(self.steps[a]), int(self.steps[a + rows - 1])
    stretch = f"at step {first:,}" if rows == 1 else f"over steps {first:,} to {last:,}"
    return (
      f"k* is ambiguous in {_percent(unsure.sum(), self.filled.sum())} of full windows, the longest stretch {stretch}"
      f"{seed}. {_percent(quiet, unsure.sum())} of these are windows whose ratio is within noise anyway, where k* "
      "means nothing."
    )

  def of_first(self) -> str:
    """Plain text: which seed a picture of one seed shows."""
    return f" of seed {self.seeds[0]}, the first" if len(self.seeds) > 1 else ""

  def exact(self) -> bool:
    return str(self.attrs.get("sketch", "")).lower().startswith("exact")

  def spectrum_section(self) -> str:
    if "singular_values" not in self.first:
      return ""
    picture = _figure(
      lambda ax: plot.singular_values(self.first, ax=ax),
      f"Singular values 1 to {self.window} of {self.whole} over optimizer steps, on a logarithmic axis.",
      f"Singular values of the window{self.of_first()}, from the largest (dark) to the smallest (light).",
    )
    return f"<h2>Singular values</h2>{picture}"

  def series_section(self) -> str:
    names, happened = plot.series_names(self.chosen), plot.events_of(self.chosen)
    if not names and not happened:
      return ""
    text = "<h2>Your series and events</h2>"
    for key in names[:12]:
      values = np.asarray(self.chosen[key].values, float).reshape(self.chosen.sizes[f"{key}_step"], -1)
      steps = self.chosen[f"{key}_step"].values
      if not np.isfinite(values).any():
        text += f"<p>{_e(key)}: no finite values.</p>"
        continue
      last = values[np.flatnonzero(np.isfinite(values).any(1))[-1]]
      low, high = np.nanmin(last), np.nanmax(last)
      now = _number(low) if low == high else f"{_number(low)} to {_number(high)} over seeds"
      words = (
        f"{key}: {len(steps):,} values, least {_number(np.nanmin(values))}, greatest {_number(np.nanmax(values))}, at "
        f"the end {now}."
      )
      text += _figure(lambda ax, key=key: plot.series(self.chosen, key, ax=ax), f"{words} Drawn over its steps.", words)
    if names[12:]:
      text += f"<p>Not drawn: {_e(_list(names[12:], 100))}.</p>"
    if happened:
      rows = []
      for number, (step, what) in enumerate(happened[:200], 1):
        row = min(int(np.searchsorted(self.steps, step)), len(self.steps) - 1)
        phases = sorted({int(p) for p in self.phase[row]})
        rows.append([str(number), _e(what), _e(_list([_PHASE_NAMES[Phase(p)] for p in phases])), f"{step:,}"])
      text += _table("Events, as numbered in the pictures", ["No.", "Event", "Phase then", "Step"], rows, left=3)
    return text

  def group_section(self) -> str:
    sums, rows = self.sums, []
    for g, group in enumerate(self.groups):
      for w, window in enumerate(self.windows):
        at = (slice(None), w, g)
        full, above = int(sums.full[at].sum()), int(sums.above[at].sum())
        places = sums.places[at].sum(0)
        k = int(places.argmax())
        ends = [int(p) for p in sums.last_phase[at]]
        common = max(sorted(set(ends)), key=ends.count)
        shown = _PHASE_NAMES[Phase(common)] + (f" ({ends.count(common)} of {len(ends)})" if len(ends) > 1 else "")
        if not full:
          rows.append([_e(group), _e(shown), str(window), "0\u00a0%", *["–"] * 7])
          continue
        best = int(sums.peak[at].argmax())
        rows.append([
          _e(group), _e(shown), str(window), _percent(full, sums.rows * len(ends)),
          _number(math.exp(sums.log_ratio[at].sum() / full)), _number(float(sums.peak[at].max())),
          f"{int(sums.peak_step[at][best]):,}", _percent(above, full),
          f"{k} ({_percent(places[k], above)})" if above else "–",
          _percent(int(sums.ambiguous[at].sum()), above), _percent(float(sums.pc1[at].sum()), full),
        ])  # fmt: skip
    heads = ["Group", "Phase at the end", "Window", "Full", "Mean ratio", "Highest", "at step",
             "Above noise", "k* there", "Ambiguous there", "σ₁² share"]  # fmt: skip
    table = _table("Every group and window, over all seeds", heads, rows, left=2)
    picture = ""
    if len(self.groups) > 1:
      of = f" Seed {self.seeds[0]}, the first." if len(self.seeds) > 1 else ""
      picture = _figure(
        lambda ax: plot.groups(self.by_group, ax=ax),
        f"Heat map of groups over time: by how much the gap ratio of each of {len(self.groups)} groups exceeds noise.",
        f"How far each group’s ratio exceeds what noise shows; white is within noise.{of}",
      )
    return f"<h2>Groups and windows</h2>{picture}{table}"

  def fidelity_section(self) -> str:
    if "effective_dim" not in self.chosen:
      return ""
    if self.exact():
      return "<h2>How far the sketch is to be trusted</h2><p>The sketch is exact: there is no sampling error.</p>"
    picture = _figure(
      lambda ax: plot.fidelity(self.chosen, ax=ax),
      "The sketch’s effective dimension over time, and the standard error of a ratio that follows from it.",
      "The effective dimension d (left) and a ratio’s standard error √(1/d) in per cent (right).",
    )
    return f"<h2>How far the sketch is to be trusted</h2>{picture}"

  def provenance_section(self) -> str:
    rows = [[_e(key), _value(value)] for key, value in self.attrs.items()]
    lacking = [key for key in ("sketch", "every", "momentum", "source") if key not in self.attrs]
    text = f"<p>Not recorded: {_e(_list(lacking))}.</p>" if lacking else ""
    table = _table("What the record says about itself", ["Attribute", "Value"], rows, left=2) if rows else ""
    return f"<h2>Where the numbers come from</h2>{text}{table}"

  # Warnings.

  def warning_box(self, notes: list[tuple[str, str]]) -> str:
    if not notes:
      return '<section class="note ok"><h2>No warnings</h2><p>Nothing in this record asks for caution.</p></section>'
    items = "".join(f"<li><b>{_e(title)}</b> {_e(text)}</li>" for title, text in notes)
    title = "One warning" if len(notes) == 1 else f"{len(notes)} warnings"
    return f'<section class="note warn"><h2>{title}</h2><ul>{items}</ul></section>'

  def warnings(self) -> list[tuple[str, str]]:
    """What asks for caution, as (title, plain text), each only where its cause is there."""
    sums, every = self.sums, self.every
    notes = []
    never = sums.full.sum(0) == 0  # [window, group]
    if never.any():
      notes.append(("Window not full.", f"It never fills for {self._places(never)}, so there is no edge to look for: "
                    "the record is too short, or the group has no updates."))  # fmt: skip
    if every is not None and every < self.window:
      notes.append((
        "Short rows.",
        f"A row sums {_steps(int(every))}, fewer than the window’s {self.window} rows. Neighbouring rows are then "
        "alike by the optimizer’s momentum alone, and a window sees little of the path; a larger "
        "every= shows slower motion.",
      ))  # fmt: skip
    note = self.momentum_note()
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
      total = sums.rows * len(self.seeds)
      here = int(counts[self.place])
      where = f" In {_percent(here, total)} of the reports of {self.whole}." if here else ""
      if not here:
        where = f" Not in {self.whole}, but in {self._places(counts > 0)}."
      elif len(self.groups) > 1 and 0 < (counts > 0).sum() < counts.size:
        where = f"{where[:-1]}, and in {int((counts > 0).sum()) - 1} of the other windows and groups."
      skipped = {Status.NONFINITE_SKIPPED: "skipped_nonfinite", Status.ZERO_SKIPPED: "skipped_zero"}.get(bit)
      if skipped in self.chosen and here:
        most = int(self.chosen[skipped].values.max())
        where += f" {_steps(most)} in all{' in the seed with the most' if len(self.seeds) > 1 else ''}."
      if bit == Status.LOW_EFFECTIVE_DIM:
        lowest = sums.least_dim.min(0)
        where += f" The least is {lowest.min():,.0f}."
      notes.append((title, explain(int(bit)) + where))
    odd = sums.missing.sum(0)
    if odd.any():
      notes.append(("Values missing.", f"The gap ratio is NaN or infinite in {odd.sum():,} reports, for "
                    f"{self._places(odd > 0)}; these are left out."))  # fmt: skip
    unknown = sum(int(sums.bits[..., bit].sum() > 0) for bit in range(32) if 1 << bit >= 2 * max(Status))
    if unknown:
      notes.append(("Unknown status.", "Reports carry status bits that this version of sedjax does not know."))
    return notes

  def _places(self, mask: np.ndarray) -> str:
    """Plain text: which windows of which groups."""
    if mask.all() and mask.size > 1:
      return "any window of any group"
    found = []
    for w, window in enumerate(self.windows):
      names = [group for g, group in enumerate(self.groups) if mask[w, g]]
      if len(names) == len(self.groups):
        found.append(f"window {window}")
      elif names:
        found.append(f"window {window} of {_list(names, 4)}")
    return _list(found, 4)

  def momentum_note(self) -> tuple[str, str] | None:
    """Where noise of an optimizer's momentum accounts for what is seen; None where it does not."""
    full = self.filled
    every, momentum = int(self.every or 1), self.momentum or 0.0
    if not full.any() or not 0 <= momentum < 1:
      return None
    if momentum and "pc1_fraction" in self.chosen:
      values = np.linalg.eigvalsh(_null.row_covariance(self.window, momentum, every))
      expected = float(values[-1] / values.sum())
      seen = float(np.median(self.chosen["pc1_fraction"].values[:, :, 0, 0][full]))
      if expected > 1.5 / self.window and seen < 1.1 * expected:
        return (
          "Momentum explains PC1.",
          f"σ₁² has a share of {_percent(seen)} in the median window, and noise with momentum {momentum:g} in rows of "
          f"{_steps(every)} already has {_percent(expected)}.",
        )
    if not momentum:
      grid, means, deviations = _null.noise_ratios(self.window, _USUAL_MOMENTUM, every)
      limits = np.exp(means + _null.ENTER * deviations)
      dims = self.chosen["effective_dim"].values[:, :, 0, 0] if "effective_dim" in self.chosen else np.full(
        self.gap.shape, 2.0 ** grid[-1])  # fmt: skip
      at = np.abs(np.log2(np.maximum(dims, 1))[..., None] - grid).argmin(-1)
      limit = limits[at, np.maximum(self.k_star, 1) - 1]
      edges = full & (self.gap > self.null)
      doubtful = edges & (self.gap <= limit)
      if doubtful.sum() > 0.5 * edges.sum() > 0:
        said = "records momentum 0" if self.momentum == 0 else "does not record the optimizer’s momentum"
        return (
          "Momentum may explain the edge.",
          f"The record {said}. If the optimizer has momentum {_USUAL_MOMENTUM:g}, noise shows as much in "
          f"{_percent(doubtful.sum(), edges.sum())} of the windows that are counted as edges: pass momentum= to the "
          "tracker.",
        )
    return None


def _value(value: Any) -> str:
  """An attribute's text, as HTML: folded away where it is long, such as a list of all parameters."""
  text = ", ".join(map(str, value.tolist())) if isinstance(value, np.ndarray) and value.ndim else str(value)
  if len(text) <= 300:
    return _e(text)
  shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
  return f"<details><summary>{len(text):,} characters: {_e(text[:60])} …</summary>{_e(shown)}</details>"
