"""The page's sections: what each says in words, its pictures and its tables.

What returns a text returns HTML, unless it says "Plain text".
"""

from __future__ import annotations

import math

import numpy as np

from sedjax import _plot_data, plot
from sedjax._html import (
  PHASE_NAMES,
  PHASE_WORDS,
  all_seeds,
  between,
  escape,
  figure,
  folded,
  listed,
  number,
  percent,
  row_steps_text,
  steps_text,
  table,
)
from sedjax._summary import Facts, Span
from sedjax._types import Phase
from sedjax._words import counted

_MANY_SPANS, _MANY_SEEDS = 12, 16


def summary(facts: Facts) -> str:
  """What happened, in a few sentences."""
  return f'<div class="lead">{"".join(f"<p>{escape(sentence)}</p>" for sentence in _headlines(facts))}</div>'


def _headlines(facts: Facts) -> list[str]:
  """Plain text."""
  count, rows = len(facts.seeds), len(facts.steps)
  who = f"{count} seeds" if count > 1 else "One run"
  span = f"steps {facts.steps[0]:,} to {facts.steps[-1]:,}" if rows > 1 else f"step {facts.steps[0]:,} alone"
  of = f" of {row_steps_text(facts.row_steps)} each" if facts.row_steps else ""
  said = [
    f"{who}, {span}, {counted(rows, 'report')}. The text is about {facts.whole} in windows of {facts.window} "
    f"rows{of}; tables have all groups and windows."
  ]
  if not facts.filled.any():
    return [*said, f"{facts.why_no_edge}, so nothing can be said about an edge."]
  first = [[span.first for span in spans if span.phase == Phase.RISE] for spans in facts.spans]
  risen = [steps[0] for steps in first if steps]
  any_edge = [any(span.phase > Phase.NO_EDGE for span in spans) for spans in facts.spans]
  if not any(any_edge):
    said.append("No edge is seen: the gap ratio never leaves what noise of the same momentum shows.")
  elif risen:
    where = f" in {all_seeds(count)}" if len(risen) == count > 1 else f" in {len(risen)} of {count} seeds" if (
      count > 1) else ""  # fmt: skip
    word = "first rises" if max(map(len, first)) > 1 else "rises"
    said.append(f"An edge {word} {between(risen)}{where}.")
  else:
    said.append("An edge is there from the first report on.")
  said.append(_edge_sentence(facts))
  ends = [int(phase) for phase in facts.sums.last_phase[facts.at]]
  kinds = [f"{PHASE_NAMES[Phase(p)]}{f' in {ends.count(p)}' if len(set(ends)) > 1 else ''}" for p in sorted(set(ends))]
  said.append(f"At the end, step {facts.steps[-1]:,}: {listed(kinds)}.")
  return said


def _edge_sentence(facts: Facts) -> str:
  """Plain text."""
  sums = facts.sums
  full, above, unsure = (int(part[facts.at].sum()) for part in (sums.full, sums.above, sums.ambiguous))
  places = sums.places[facts.at].sum(0)
  k = int(places.argmax())
  if not above:
    return f"The gap ratio exceeds what noise shows in none of {counted(full, 'full window')}."
  return (
    f"The gap ratio exceeds what noise shows in {percent(above, full)} of full windows. There k* is {k} in "
    f"{percent(places[k], above)}, and ambiguous in {percent(unsure, above)}."
  )


def _seed_words(spans: list[Span]) -> str:
  """One seed's phases, as plain text."""
  if len(spans) > _MANY_SPANS:
    longest = sorted(spans, key=lambda span: -span.steps)[:3]
    told = [f"{PHASE_WORDS[Phase(s.phase)]} from step {s.first:,} for {steps_text(s.steps)}" for s in
            sorted(longest, key=lambda span: span.first)]  # fmt: skip
    rises = [span.first for span in spans if span.phase == Phase.RISE]
    begins = f" The first of {counted(len(rises), 'rise')} begins at step {rises[0]:,}." if rises else ""
    return f"The phase changes {len(spans) - 1:,} times. Longest: {listed(told)}.{begins}"
  told = [f"{PHASE_WORDS[Phase(span.phase)]} from step {span.first:,}" for span in spans]
  words = ", then ".join(told)
  return f"{words[0].upper()}{words[1:]}, until the record ends at step {spans[-1].last:,}."


def phase_section(facts: Facts) -> str:
  """The phases of each seed, and whether the seeds agree."""
  shown = facts.seeds[:_MANY_SEEDS]
  items = "".join(
    f"<li>{f'<b>Seed {escape(seed)}.</b> ' if len(facts.seeds) > 1 else ''}{escape(_seed_words(spans))}</li>"
    for seed, spans in zip(shown, facts.spans, strict=False)
  )
  rest = len(facts.seeds) - len(shown)
  more = f"<p>{counted(rest, 'more seed')} in the tables of groups and windows.</p>" if rest else ""
  rows, left_out, most = [], 0, max(4, 3 * _MANY_SPANS // len(shown))
  for seed, spans in zip(shown, facts.spans, strict=False):
    kept = sorted(spans, key=lambda span: -span.steps)[:most]
    left_out += len(spans) - len(kept)
    for span in sorted(kept, key=lambda span: span.first):
      lasts = steps_text(span.steps) + " so far" * (span.until is None) if span.steps else "one row so far"
      rows.append([escape(seed), escape(PHASE_NAMES[Phase(span.phase)]), f"{span.first:,}", lasts,
                   number(span.peak)])  # fmt: skip
  listing = table(
    "Phases, with their first step and how long they last", ["Seed", "Phase", "First step", "Lasts", "Highest ratio"],
    rows, left=2,
  )  # fmt: skip
  cut = f"<p>{counted(left_out, 'shorter span')} not listed.</p>" if left_out else ""
  picture = figure(
    lambda ax: plot.gap_ratio(facts.chosen, ax=ax, group=facts.group),
    f"Gap ratio over optimizer steps with phases shaded. {' '.join(_headlines(facts)[1:2])}",
    f"The ratio at k* of {facts.whole}. Each point is drawn where its window ends and looks back {facts.looks_back}. "
    "The dotted line is what noise seldom exceeds.",
  )
  return f"<h2>Phases</h2>{picture}<ul>{items}</ul>{more}{_agreement(facts)}{listing}{cut}"


def _agreement(facts: Facts) -> str:
  if len(facts.seeds) < 2:
    return ""
  full = facts.filled.all(1)
  if not full.any():
    why = "there is no step at which the windows of all seeds are full, and their ratios finite"
    return f"<h3>Do the seeds agree?</h3><p>That cannot be said: {why}.</p>"
  same_phase = (facts.phase == facts.phase[:, :1]).all(1)[full].mean()
  edges = full & (facts.gap > facts.null).all(1)
  who = all_seeds(len(facts.seeds)).capitalize()
  lines = [f"{who} are in one phase in {percent(same_phase)} of the reports with full windows."]
  if edges.any():
    same_k = (facts.k_star == facts.k_star[:, :1]).all(1)[edges].mean()
    lines.append(f"Where all exceed noise, they agree on k* in {percent(same_k)}.")
  for phase in (Phase.RISE, Phase.PLATEAU, Phase.COLLAPSE):
    firsts = [next((s.first for s in spans if s.phase == phase), None) for spans in facts.spans]
    found = [step for step in firsts if step is not None]
    if found:
      some = "all seeds" if len(found) == len(firsts) else f"{len(found)} of {len(firsts)} seeds"
      lines.append(f"The first {PHASE_NAMES[phase]} begins {between(found)} ({some}).")
  return f"<h3>Do the seeds agree?</h3><p>{escape(' '.join(lines))}</p>"


def edge_section(facts: Facts) -> str:
  """How high the ratio rose above noise, where the edge was, and what stayed ambiguous."""
  if not facts.filled.any():
    return f"<h2>The edge, and how sure it is</h2><p>{facts.why_no_edge}: there is no edge to speak of.</p>"
  sums = facts.sums
  best = int(sums.peak[facts.at].argmax())
  peak, step = float(sums.peak[facts.at][best]), int(sums.peak_step[facts.at][best])
  row = int(np.searchsorted(facts.steps, step))
  seed = f" (seed {facts.seeds[best]})" if len(facts.seeds) > 1 else ""
  dim = float(sums.least_dim[facts.at].min())
  sure = [
    _edge_sentence(facts),
    f"The highest ratio is {number(peak)} at step {step:,}{seed}, where noise seldom exceeds "
    f"{number(float(facts.null[row, best]))}.",
  ]
  if facts.exact:
    sure.append("The sketch is exact, so ratios have no sampling error.")
  elif math.isfinite(dim):
    error = number(100 / math.sqrt(max(dim, 1)), 2)
    sure.append(
      f"Ratios have a standard error of about {error}\u00a0% (√(1/d), with an effective dimension d of at least "
      f"{dim:,.0f}), and more where singular values are near each other."
    )
  places = sums.places[facts.at].sum(0)
  if np.count_nonzero(places) > 1:
    shares = [f"{k} in {percent(places[k], places.sum())}" for k in np.argsort(-places)[:4] if places[k]]
    sure.append(f"Places of k* above noise: {listed(shares)}.")
  pictures = ""
  if "ratios" in facts.first:
    pictures += figure(
      lambda ax: plot.ratios(facts.first, ax=ax, group=facts.group),
      f"Heat map of all consecutive ratios over time with k* marked. {_edge_sentence(facts)}",
      f"All ratios σ_k/σ_(k+1){facts.of_first}: the darker, the larger. Squares mark k* where it is clear, circles "
      "where it is ambiguous.",
    )
  pictures += figure(
    lambda ax: plot.against_null(facts.chosen, ax=ax, group=facts.group),
    f"Gap ratio divided by what noise shows, over time; highest ratio {number(peak)} at step {step:,}.",
    "The live ratio divided by what noise with the recorded momentum, seen through the same sketch, seldom exceeds.",
  )
  return (
    f"<h2>The edge, and how sure it is</h2><p>{escape(' '.join(sure))}</p>{pictures}<h3>What stayed ambiguous</h3>"
    f"<p>{escape(_ambiguity(facts))}</p>"
  )


def _ambiguity(facts: Facts) -> str:
  """Plain text."""
  if "edge_ambiguous" not in facts.chosen:
    return "The record does not say."
  unsure = (facts.chosen["edge_ambiguous"].values[:, :, 0, 0] > 0) & facts.filled
  if not unsure.any():
    return "Nothing: in every full window k* stands out from all other places by more than the sketch’s error."
  longest = (0, 0, 0)
  for i in range(unsure.shape[1]):
    edges = np.flatnonzero(np.diff(unsure[:, i].astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    if len(edges):
      a, b = edges[(edges[:, 1] - edges[:, 0]).argmax()]
      longest = max(longest, (int(b - a), int(a), i))
  rows, a, i = longest
  seed = f" (seed {facts.seeds[i]})" if len(facts.seeds) > 1 else ""
  quiet = (unsure & (facts.gap <= facts.null)).sum()
  first, last = int(facts.steps[a]), int(facts.steps[a + rows - 1])
  stretch = f"at step {first:,}" if rows == 1 else f"over steps {first:,} to {last:,}"
  return (
    f"k* is ambiguous in {percent(unsure.sum(), facts.filled.sum())} of full windows, the longest stretch {stretch}"
    f"{seed}. {percent(quiet, unsure.sum())} of these are windows whose ratio is within noise anyway, where k* "
    "means nothing."
  )


def spectrum_section(facts: Facts) -> str:
  """All singular values over time; empty where the record has none."""
  if "singular_values" not in facts.first:
    return ""
  picture = figure(
    lambda ax: plot.singular_values(facts.first, ax=ax, group=facts.group),
    f"Singular values 1 to {facts.window} of {facts.whole} over optimizer steps, on a logarithmic axis.",
    f"Singular values of the window{facts.of_first}, from the largest (dark) to the smallest (light).",
  )
  return f"<h2>Singular values</h2>{picture}"


def series_section(facts: Facts) -> str:
  """The user's series, each with a picture, and events; empty where there are none."""
  names, happened = _plot_data.series_names(facts.chosen), _plot_data.events_of(facts.chosen)
  if not names and not happened:
    return ""
  text = "<h2>Your series and events</h2>"
  for key in names[:12]:
    values, steps = np.asarray(facts.chosen[key].values, float), facts.chosen[f"{key}_step"].values
    if not values.size:
      text += f"<p>{escape(key)}: no values.</p>"
      continue
    values = values.reshape(len(steps), -1)
    finite = np.isfinite(values)
    if not finite.any():
      text += f"<p>{escape(key)}: no finite values.</p>"
      continue
    end = np.flatnonzero(finite.any(1))[-1]
    low, high = values[end][finite[end]].min(), values[end][finite[end]].max()
    now = number(low) if low == high else f"{number(low)} to {number(high)} over seeds"
    words = (
      f"{key}: {counted(len(steps), 'value')}, least {number(values[finite].min())}, greatest "
      f"{number(values[finite].max())}, at the end {now}."
    )
    if end + 1 < len(steps):
      words = f"{words[:-1]}, at step {steps[end]:,}; after it {counted(len(steps) - 1 - end, 'value')}, none finite."
    text += figure(lambda ax, key=key: plot.series(facts.chosen, key, ax=ax), f"{words} Drawn over its steps.", words)
  if names[12:]:
    text += f"<p>Not drawn: {escape(listed(names[12:], 100))}.</p>"
  if happened:
    rows = []
    for i, (step, what) in enumerate(happened[:200], 1):
      if facts.steps[0] <= step <= facts.steps[-1]:
        phases = sorted({int(p) for p in facts.phase[int(np.searchsorted(facts.steps, step))]})
        then = listed([PHASE_NAMES[Phase(p)] for p in phases])
      else:
        then = "after the last row" if step > facts.steps[-1] else "before the first row"
      rows.append([str(i), escape(what), escape(then), f"{step:,}"])
    text += table("Events, as numbered in the pictures", ["No.", "Event", "Phase then", "Step"], rows, left=3)
    if happened[200:]:
      text += f"<p>{counted(len(happened) - 200, 'later event')} not listed.</p>"
  return text


def group_section(facts: Facts) -> str:
  """A table of all groups and windows, and a picture of groups where there are several."""
  sums, rows = facts.sums, []
  for g, group in enumerate(facts.groups):
    for w, window in enumerate(facts.windows):
      at = (slice(None), w, g)
      full, above = int(sums.full[at].sum()), int(sums.above[at].sum())
      places = sums.places[at].sum(0)
      k = int(places.argmax())
      ends = [int(p) for p in sums.last_phase[at]]
      common = max(sorted(set(ends)), key=ends.count)
      shown = PHASE_NAMES[Phase(common)] + (f" ({ends.count(common)} of {len(ends)})" if len(ends) > 1 else "")
      if not full:
        rows.append([escape(group), escape(shown), str(window), "0\u00a0%", *["–"] * 7])
        continue
      best = int(sums.peak[at].argmax())
      rows.append([
        escape(group), escape(shown), str(window), percent(full, sums.rows * len(ends)),
        number(math.exp(sums.log_ratio[at].sum() / full)), number(float(sums.peak[at].max())),
        f"{int(sums.peak_step[at][best]):,}", percent(above, full),
        f"{k} ({percent(places[k], above)})" if above else "–",
        percent(int(sums.ambiguous[at].sum()), above), percent(float(sums.pc1[at].sum()), full),
      ])  # fmt: skip
  heads = ["Group", "Phase at the end", "Window", "Full", "Mean ratio", "Highest", "at step",
           "Above noise", "k* there", "Ambiguous there", "σ₁² share"]  # fmt: skip
  listing = table("Every group and window, over all seeds", heads, rows, left=2)
  picture = ""
  if len(facts.groups) > 1:
    of = f" Seed {facts.seeds[0]}, the first." if len(facts.seeds) > 1 else ""
    picture = figure(
      lambda ax: plot.groups(facts.by_group, ax=ax),
      f"Heat map of groups over time: by how much the gap ratio of each of {len(facts.groups)} groups exceeds noise.",
      f"How far each group’s ratio exceeds what noise shows; white is within noise.{of}",
    )
  return f"<h2>Groups and windows</h2>{picture}{listing}"


def fidelity_section(facts: Facts) -> str:
  """How good the sketch was; empty where the record does not say."""
  if "effective_dim" not in facts.chosen:
    return ""
  if facts.exact:
    return "<h2>How far the sketch is to be trusted</h2><p>The sketch is exact: there is no sampling error.</p>"
  picture = figure(
    lambda ax: plot.fidelity(facts.chosen, ax=ax, group=facts.group),
    "The sketch’s effective dimension over time, and the standard error of a ratio that follows from it.",
    "The effective dimension d (left) and a ratio’s standard error √(1/d) in per cent (right).",
  )
  return f"<h2>How far the sketch is to be trusted</h2>{picture}"


def provenance_section(facts: Facts) -> str:
  """The record's attributes, and which are lacking."""
  rows = [[escape(key), folded(value)] for key, value in facts.attrs.items()]
  lacking = [key for key in ("sketch", "every", "momentum", "source") if key not in facts.attrs]
  odd = [key for key in ("every", "momentum") if key in facts.attrs and getattr(facts, key) is None]
  text = "".join(
    f"<p>{what}: {escape(listed(keys))}.</p>"
    for what, keys in (("Not recorded", lacking), ("Recorded with a value that cannot be", odd))
    if keys
  )
  listing = table("What the record says about itself", ["Attribute", "Value"], rows, left=2) if rows else ""
  return f"<h2>Where the numbers come from</h2>{text}{listing}"


def warning_box(notes: list[tuple[str, str]]) -> str:
  """Warnings, by title and text, or that there are none."""
  if not notes:
    return '<section class="note ok"><h2>No warnings</h2><p>Nothing in this record asks for caution.</p></section>'
  items = "".join(f"<li><b>{escape(title)}</b> {escape(text)}</li>" for title, text in notes)
  title = "One warning" if len(notes) == 1 else f"{len(notes)} warnings"
  return f'<section class="note warn"><h2>{title}</h2><ul>{items}</ul></section>'
