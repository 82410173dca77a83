"""Rebuilds the benchmark tables in README.md from the stored results, and prints them.

python benchmarks/report.py            # writes README.md
python benchmarks/report.py --check    # exit status 1 where README.md is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
Section = dict[str, Any]


# ---- numbers in words ----


def digits(x: float | None, count: int = 3) -> str:
  """A number with so many digits, not in powers of ten."""
  if x is None:
    return "–"
  if x == 0:
    return "0"
  text = f"{x:.{count}g}"
  return f"{float(text):,.0f}" if "e" in text or abs(x) >= 10**count else text


def duration(seconds: float | None) -> str:
  if seconds is None:
    return "–"
  for unit, size in (("s", 1.0), ("ms", 1e-3)):
    if abs(seconds) >= size:
      return f"{digits(seconds / size)} {unit}"
  return f"{digits(seconds / 1e-6)} µs"


def memory(count: int | None) -> str:
  if count is None:
    return "–"
  for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if abs(count) >= size:
      return f"{digits(count / size)} {unit}"
  return f"{count} B"


def percent(share: float, count: int = 2) -> str:
  return f"{digits(100 * share, count)} %"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """A Markdown table; the first column reads from the left, the others from the right."""
  head = list(head)
  lines = [head, ["---", *["---:"] * (len(head) - 1)], *(list(row) for row in rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- sections ----


def skipped(line: Section, names: list[str], width: int) -> list[str]:
  return [*names, line["skipped"], *[""] * (width - len(names) - 1)]


def show_observe(section: Section) -> str:
  head = ["tree", "parameters, leaves", "`global_norm`", "column sums", "`observe`", "÷ `global_norm`", "÷ column sums"]
  head += ["temporaries", "compiling, bound → `observe`"]
  rows = []
  for line in section["lines"]:
    names = [f"`{line['tree']}`, {line['dtype']}", f"{line['parameters']:,}, {line['leaves']}"]
    if "skipped" in line:
      rows.append(skipped(line, names, len(head)))
      continue
    norm, sums, ours = line["global_norm"], line["column_sums"], line["observe"]
    times = [duration(each["best_s"]) for each in (norm, sums, ours)]
    ratios = [digits(line[f"ratio_to_{bound}"]) for bound in ("global_norm", "column_sums")]
    compiling = f"{duration(norm['compile_s'])} → {duration(ours['compile_s'])}"
    rows.append([*names, *times, *ratios, memory(ours["temporary_bytes"]), compiling])
  return "The whole tracker, W = 10, `count(16384)`, one row a step:\n\n" + table(head, rows)


def show_flatness(section: Section) -> str:
  usual = section["usual"]
  rows = [
    [f"W = {line['window']}, d = {line['dim']:,}", duration(line["best_s"]), digits(line["ratio_to_usual"])]
    for line in section["lines"]
  ]
  words = (
    f"Windows and sketches of other sizes, `{section['tree']}`; ratio to W = {usual['window']}, d = {usual['dim']:,}:"
  )
  return words + "\n\n" + table(["size", "`observe`", "ratio"], rows)


def show_params(section: Section) -> str:
  rows = [
    [
      f"`{line['tree']}`",
      *(duration(line[kind]["best_s"]) for kind in ("nothing", "between", "reading")),
      duration(line["added_s"]),
      duration(line["average_s"]),
    ]
    for line in section["lines"]
  ]
  head = [
    "tree",
    "step that does nothing",
    "step in between",
    "step that reads",
    "in between adds",
    "average of all steps",
  ]
  every = section["lines"][0]["every"]
  return f'`source="params", every={every}`:\n\n' + table(head, rows)


def show_seeds(section: Section) -> str:
  head = ["tree", "seeds", "one by one", "vmapped", "ratio", "temporaries", "of the stacked tree"]
  rows = []
  for line in section["lines"]:
    names = [f"`{line['tree']}`", str(line["seeds"])]
    if "skipped" in line:
      rows.append(skipped(line, names, len(head)))
      continue
    times = [duration(line[kind]["best_s"]) for kind in ("one_by_one", "together")]
    share = line["temporaries_of_stacked"]
    used = memory(line["together"]["temporary_bytes"])
    rows.append([*names, *times, digits(line["ratio"]), used, "–" if share is None else percent(share)])
  return "Vmapped seeds, and as many single calls:\n\n" + table(head, rows)


def show_step(section: Section) -> str:
  head = ["model, batch", "step without", "tracker adds", "that is", "paired steps"]
  rows = []
  for line in section["lines"]:
    batch = " × ".join(str(size) for size in line["batch"])
    adds = f"{duration(line['difference_s'])} ± {duration(line['difference_standard_error_s'])}"
    share = f"{percent(line['overhead'])} ± {percent(line['overhead_standard_error'])}"
    without = duration(line["without"]["median_s"])
    rows.append([f"`{line['tree']}`, {batch}", without, adds, share, str(line["rounds"])])
  return "Training steps (AdamW) with and without the tracker; mean difference ± its standard error:\n\n" + table(
    head, rows
  )


def show_eigen(section: Section) -> str:
  batches = list(section["lines"][0]["batches"])
  shown = [batches[0], batches[-1]]
  methods = ("svd", "eigh", "jacobi", "householder")
  with_time = [(batch, method) for batch in shown for method in methods if method != "svd" or batch == batches[0]]
  conditions = list(section["lines"][0]["max_relative_error"]["eigh"])
  head = ["rows", *(f"{method}, batch {batch}" for batch, method in with_time)]
  head += [f"{method}, error at σ₁/σₙ = {conditions[-1]}" for method in methods]
  rows = []
  for line in section["lines"]:
    times = [duration(line["batches"][batch][method]["best_s"]) for batch, method in with_time]
    errors = [percent(line["max_relative_error"][method][conditions[-1]]) for method in methods]
    rows.append([str(line["rows"]), *times, *errors])
  words = (
    f"Spectrum of a few rows: SVD of the rows (d = {section['dim']:,}), `eigh` of their Gram matrix, parallel Jacobi "
  )
  words += "with as many sweeps as it needs, and what the tracker does from 64 rows on (Householder, Sturm, powers for "
  words += "the leading vector); largest relative error of a singular value:"
  return words + "\n\n" + table(head, rows)


def show_peers(section: Section) -> str:
  equal = section["equal_dim"]
  head = ["projection", "time", "÷ `global_norm`", "memory added", "error, even / rank one", f"at d = {equal:,}"]
  rows, partly = [], False
  for line in section["lines"]:
    if "skipped" in line:
      rows.append(skipped(line, [line["name"]], len(head)))
      continue
    part = line["projected_parameters"] < line["parameters"]
    partly |= part
    found = {each["dim"]: f"{percent(each['even'])} / {percent(each['rank one'])}" for each in line["errors"]}
    errors = [found.get(dim, "–") for dim in (line["dim"], equal)]
    times = [duration(line["scaled_s"]) + "*" * part, digits(line["ratio"])]
    rows.append([line["name"], *times, memory(line["added_bytes"]) + "*" * part, *errors])
  words = f"Ways to project one update of `{section['tree']}`; d in parentheses. Errors are those of inner products of "
  words += f"{section['pairs']} pairs on `{section['error_tree']}`; a dense Gaussian map of d = {equal:,} has "
  words += f"{percent(section['equal_dim_law'])}:"
  note = "\n\n\\* Only a part fits in memory; the time is scaled to the whole, the memory is not." if partly else ""
  return words + "\n\n" + table(head, rows) + note


SHOW = {
  "observe": show_observe,
  "flatness": show_flatness,
  "params": show_params,
  "seeds": show_seeds,
  "step": show_step,
  "peers": show_peers,
  "eigen": show_eigen,
}


def origin(sections: dict[str, Section]) -> str:
  """Where the numbers come from, in one paragraph."""
  made = [section["made_by"] for section in sections.values()]
  device, found = made[0]["device"], made[0]["versions"]
  name = f"{device['count']} × {device['kind']}, " if device["platform"] != "cpu" else ""
  commits = sorted({f"{(each['commit'] or 'unknown')[:12]}{' with changes' * bool(each['dirty'])}" for each in made})
  dates = sorted({each["date"][:10] for each in made})
  packages = ", ".join(f"{package} {found[package]}" for package in ("jax", "jaxlib", "optax", "numpy"))
  return (
    f"{name}{device['cpu']}, {device['cores']} cores; Python {found['python']}, {packages}; "
    f"commit {', '.join(commits)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
  )


def tables(stem: str, sections: dict[str, Section]) -> str:
  """All tables of one device, in Markdown."""
  parts = [f"### On {stem}", f"{origin(sections)} (`benchmarks/results/{stem}.json`)."]
  return "\n\n".join(parts + [show(sections[name]) for name, show in SHOW.items() if name in sections])


def all_tables(folder: Path) -> str:
  """The tables of every device whose results are stored."""
  found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
  # Other programs' results lie in the same folder.
  ours = {stem: each for stem, each in found.items() if each and set(each) <= set(SHOW)}
  return "\n\n".join(tables(stem, sections) for stem, sections in ours.items()) or "No results are stored yet."


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description="Rebuilds the benchmark tables in README.md.")
  parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if README.md is out of date")
  args = parser.parse_args(argv)
  text = all_tables(ROOT / "benchmarks" / "results")
  print(text)
  file = ROOT / "README.md"
  old = file.read_text()
  if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
    sys.exit(f"README.md has no place for the tables: it needs one line {BEGIN} and after it one line {END}.")
  new = f"{old[: old.index(BEGIN)]}{BEGIN}\n\n{text}\n\n{old[old.index(END) :]}"
  if new != old and args.check:
    sys.exit("README.md is out of date: run python benchmarks/report.py.")
  if new != old:
    file.write_text(new)


if __name__ == "__main__":
  main(sys.argv[1:])
