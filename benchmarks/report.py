"""Rebuilds the tables in README.md and all of benchmarks/RESULTS.md from the stored results.

python benchmarks/report.py            # writes both
python benchmarks/report.py --check    # exit status 1 where one is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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
  bounds = ["global_norm", "column_sums"]
  words = "The whole tracker, W = 10, `count(16384)`, one row a step"
  if section["made_by"]["device"]["platform"] != "cpu":  # where a copy's pages are made first, which takes longer
    head.append("÷ reading at copying speed")
    bounds.append("copying")
    words += f"; a large array is copied at {digits(section['copy_bytes_per_s'] / 1e9)} GB/s, read and written"
  head += ["temporaries", "compiling, bound → `observe`"]
  rows = []
  for line in section["lines"]:
    names = [f"`{line['tree']}`, {line['dtype']}", f"{line['parameters']:,}, {line['leaves']}"]
    if "skipped" in line:
      rows.append(skipped(line, names, len(head)))
      continue
    norm, sums, ours = line["global_norm"], line["column_sums"], line["observe"]
    times = [duration(each["best_s"]) for each in (norm, sums, ours)]
    ratios = [digits(line[f"ratio_to_{bound}"]) for bound in bounds]
    compiling = f"{duration(norm['compile_s'])} → {duration(ours['compile_s'])}"
    rows.append([*names, *times, *ratios, memory(ours["temporary_bytes"]), compiling])
  return words + ":\n\n" + table(head, rows)


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


def _mean_and_error(line: Section) -> str:
  return f"{duration(line['difference_s'])} ± {duration(line['difference_standard_error_s'])}"


def show_step(section: Section) -> str:
  head = ["model, batch", "step without", "tracker adds", "that is", "paired steps", "temporaries it adds"]
  head += ["`observe` between steps", "that is", '`source="params"` adds between two readings']
  rows = []
  for line in section["lines"]:
    if "skipped" in line:
      rows.append(skipped(line, [f"`{line['tree']}`, {line['dtype']}"], len(head)))
      continue
    batch = " × ".join(str(size) for size in line["batch"])
    adds = _mean_and_error(line)
    share = f"{percent(line['overhead'])} ± {percent(line['overhead_standard_error'])}"
    without = duration(line["without"]["median_s"])
    alone = line["alone"]["median_s"]
    more = line["with"]["temporary_bytes"] - line["without"]["temporary_bytes"]
    names = [f"`{line['tree']}`, {line.get('dtype', 'float32')}, {batch}", without, adds, share, str(line["rounds"])]
    reads_nothing = _mean_and_error(line["params"]) if "params" in line else "–"
    rows.append([*names, memory(more), duration(alone), percent(alone / line["without"]["median_s"]), reads_nothing])
  return (
    "Training steps (AdamW) with and without the tracker, mean difference ± its standard error, and `observe` by "
    "itself, timed between the steps:\n\n" + table(head, rows)
  )


def show_eigen(section: Section) -> str:
  batches = list(section["lines"][0]["batches"])
  shown = [batches[0], batches[-1]]
  methods = list(section["lines"][0]["max_relative_error"])
  with_time = [(batch, method) for batch in shown for method in methods if method != "svd" or batch == batches[0]]
  conditions = list(section["lines"][0]["max_relative_error"]["eigh"])
  head = ["rows", *(f"{method}, batch {batch}" for batch, method in with_time)]
  head += [f"{method}, error at σ₁/σₙ = {conditions[-1]}" for method in methods]
  rows = []
  for line in section["lines"]:
    times = [duration(line["batches"][batch][method]["best_s"]) for batch, method in with_time]
    errors = [percent(line["max_relative_error"][method][conditions[-1]]) for method in methods]
    rows.append([str(line["rows"]), *times, *errors])
  words = f"Spectrum of a few rows: SVD of the rows (d = {section['dim']:,}), `eigh` of their Gram matrix, parallel "
  words += "Jacobi with as many sweeps as it needs, and *householder* (Sturm's sequence, powers for the leading "
  words += "vector), which the tracker does from 64 rows on a CPU, and on a GPU always, as one *kernel*; largest "
  words += "relative error of a singular value:"
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


def origin(made: list[dict[str, Any]]) -> str:
  """Where the numbers come from, in one sentence."""
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
  parts = [f"## On {stem}", f"{origin_of(sections)} (`benchmarks/results/{stem}.json`)."]
  return "\n\n".join(parts + [show(sections[name]) for name, show in SHOW.items() if name in sections])


def devices() -> dict[str, dict[str, Section]]:
  """What `run.py` measured, by device."""
  found = {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}
  # Other programs' results lie in the same folder.
  return {stem: each for stem, each in found.items() if each and set(each) <= set(SHOW)}


def show_devices() -> str:
  """In short, what tracking costs on every device whose results are stored."""
  head = ["device", "tree", "`observe`", "÷ `global_norm`", "÷ column sums", "temporaries"]
  rows, steps = [], []
  for sections in devices().values():
    for line in sections.get("observe", {"lines": []})["lines"]:
      if "skipped" not in line:
        ratios = [digits(line[f"ratio_to_{bound}"]) for bound in ("global_norm", "column_sums")]
        time, used = duration(line["observe"]["best_s"]), memory(line["observe"]["temporary_bytes"])
        rows.append([name_of(sections["observe"]), f"`{line['tree']}`, {line['dtype']}", time, *ratios, used])
    for line in sections.get("step", {"lines": []})["lines"]:
      if "skipped" not in line:
        share = f"{percent(line['overhead'])} ± {percent(line['overhead_standard_error'])}"
        model = f"`{line['tree']}`, {' × '.join(map(str, line['batch']))}"
        without = duration(line["without"]["median_s"])
        steps.append([name_of(sections["step"]), model, without, _mean_and_error(line), share])
  words = "The whole tracker, W = 10, `count(16384)`, one row a step, and what reading the updates once costs"
  step_words = "Training steps (forward, backward, AdamW), mean difference ± its standard error"
  step_head = ["device", "model, batch", "step without", "tracker adds", "that is"]
  made = ["`python benchmarks/run.py --device cpu` or `gpu`:", *(f"- {origin_of(each)}" for each in devices().values())]
  parts = [f"{words}:", table(head, rows), f"{step_words}:", table(step_head, steps), "\n".join(made)]
  return "\n\n".join(parts)


def origin_of(sections: dict[str, Section]) -> str:
  return origin([section["made_by"] for section in sections.values()])


def name_of(section: Section) -> str:
  """The device, as people call it."""
  device = section["made_by"]["device"]
  return device["cpu"] if device["platform"] == "cpu" else device["kind"]


def show_results() -> str:
  """All of RESULTS.md: every table of every device."""
  parts = ["# Results", "Every stored result; [README.md](README.md) says how each was measured and how to read it. "]
  parts[1] += "This page is written by `python benchmarks/report.py`."
  parts += [tables(stem, sections) for stem, sections in devices().items()]
  for file in sorted(RESULTS.glob("posthoc-*.json")):
    parts += [f"## Checkpoints, on {file.stem.removeprefix('posthoc-')}", posthoc_table(file.stem)]
  parts += ["## Fidelity", fidelity_targets(), "## Noise", show_noise(), "## A large record", show_records()]
  return "\n\n".join(parts) + "\n"


def stored(stem: str) -> Section:
  return json.loads((RESULTS / f"{stem}.json").read_text())


def show_fidelity() -> str:
  """How the sketches that the library offers compare with the exact spectra."""
  result = stored("fidelity")
  lines = {(line["run"], line["map"], line["dim"]): line for line in result["lines"]}
  names = {
    ("grok", "gaussian", 100): "`gaussian(100)`, the paper's d = 10W",
    ("grok", "gaussian", 1000): "`gaussian(1000)`",
    ("grok", "count", 1024): "`count(1024)`",
    ("grok", "count", 16384): "`count(16384)`, the default",
    ("grok", "count", 65536): "`count(65536)`",
    ("no decay", "count", 16384): "the default on a run without weight decay",
  }
  head = ["sketch", "mean error of σ₁/σ₂, %", "of σ₂/σ₃, %", "of σ₃/σ₄, %", "k* differs, %", "flagged ambiguous, %"]
  head += ["k* differs though not flagged, %", "windows"]
  rows = []
  for (run, kind, dim), name in names.items():
    line, law = lines[run, kind, dim], lines[run, "law", dim]
    errors = [f"{100 * line[k]['mean']:.2f} ({100 * law[k]['mean']:.2f})" for k in ("error_12", "error_23", "error_34")]
    differs = " ".join((digits(100 * line["k_star_differs"], 2), f"({digits(100 * law['k_star_differs'], 2)})"))
    shares = [digits(100 * line[k], 2) for k in ("flagged", "differs_of_unflagged")]
    rows.append([name, *errors, differs, *shares, f"{line['windows']:,}"])
  made = result["provenance"]
  versions = ", ".join(f"{package} {made['versions'][package]}" for package in ("jax", "numpy"))
  where = f"{made['device']}; Python {made['versions']['python']}, {versions}; commit {made['commit'][:12]}"
  parameters = f"{result['parameters']:,} parameters"
  return f"{table(head, rows)}\n\n*{parameters}; `{made['command']}`; {where} (`benchmarks/results/fidelity.json`).*"


TARGETS = ["target", "found", "at most", "met"]


def met(target: Section) -> str:
  return "yes" if target["met"] else "**no**"


def fidelity_targets() -> str:
  """What the sketches were to reach; README.md has the table of errors."""
  result = stored("fidelity")
  rows = []
  for each in result["verdicts"]:
    found, most = (f"{digits(100 * each[name])} %" for name in ("found", "limit"))
    most += f", {each['limit_is']}" if "law" in each["limit_is"] else ""
    rows.append([each["target"], found, most, met(each)])
  made = result["provenance"]
  where = f"`{made['command']}`; commit {made['commit'][:12]} (`benchmarks/results/fidelity.json`)"
  return f"{table(TARGETS, rows)}\n\n*{where}. The law is what a dense Gaussian map of that dimension has.*"


# Of a way to compare checkpoints and where their files lie, as `posthoc.py` names them.
WAYS = {"sketch": "`sedjax analyze`", "exact": "`sedjax analyze --sketch exact`", "load all": "load all and compare"}
FILES = {"cold": "on disk", "warm": "in the page cache"}


def way_and_files(name: str) -> list[str]:
  kind, state = name.split(", ")
  return [WAYS[kind], FILES[state]]


def show_posthoc() -> str:
  """In short, what the analysis of checkpoints costs on every CPU whose results are stored."""
  results = [stored(file.stem) for file in sorted(RESULTS.glob("posthoc-*.json"))]
  head = ["way", "files", "peak memory", *(result["device"]["cpu"] for result in results)]
  rows = []
  for name in results[0]["ways"]:
    ways = [result["ways"][name] for result in results]
    times = [f"{duration(way['seconds'])}, {digits(way['ratio_to_reading'])} ×" for way in ways]
    rows.append([*way_and_files(name), memory(max(way["peak_bytes"] for way in ways)), *times])
  size = f"{results[0]['checkpoints']} checkpoints, {memory(results[0]['bytes'])}"
  words = f"*{size}; × is of the time that reading and summing the same files takes."
  few = {str(result["ways"]["load all, cold"]["checkpoints"]) for result in results}
  words += f" Memory had room to load and compare {' or '.join(sorted(few))} of them.*"
  made = [f"`{results[0]['command']}`:", *(f"- {origin([result])}" for result in results)]
  return "\n\n".join([table(head, rows), words, "\n".join(made)])


def posthoc_table(stem: str) -> str:
  result = stored(stem)
  head = ["way", "files", "checkpoints", "time", "÷ reading and summing them", "peak memory"]
  rows = []
  for name, way in result["ways"].items():
    count = str(way.get("checkpoints", result["checkpoints"]))
    time, ratio = duration(way["seconds"]), digits(way["ratio_to_reading"])
    rows.append([*way_and_files(name), count, time, ratio, memory(way["peak_bytes"])])
  size = f"{result['checkpoints']} checkpoints, {memory(result['bytes'])}"
  made = f"`{result['command']}`; {origin([result])} (`benchmarks/results/{stem}.json`)"
  targets = []
  for name, target in result["targets"].items():
    found = target["found"]
    shown = digits(found) if found >= 1e-4 or found == 0 else f"{found:.1g}"
    targets.append([name, shown, digits(target["most"]), met(target)])
  return f"{table(head, rows)}\n\n*{size}. {made}.*\n\n{table(TARGETS, targets)}"


def show_noise() -> str:
  """How often noise alone passed for an edge."""
  result = stored("noise")
  kinds = {0.0: "equal", "schedule": "warm-up and cosine"}
  rows = []
  for line in result["lines"]:
    norms = kinds[line["norms"]] if line["norms"] in kinds else f"vary by {percent(line['norms'])}"
    low, high = (digits(1e5 * count / line["rows"], 2) for count in line["clusters_interval_95"])
    count = f"{line['clusters']} ({line['alarms']})"
    cells = [str(line[name]) for name in ("momentum", "every")]
    rate = f"{digits(1e5 * line['clusters'] / line['rows'], 2)} ({low} to {high})"
    rows.append([f"W = {line['window']}, d = {line['dim']:,}", *cells, norms, f"{line['rows']:,}", count, rate])
  head = ["window", "momentum", "steps a row", "norms", "rows", "false alarms (rows of them)", "in 10⁵ rows"]
  made = f"`{result['made_by']['command']}`; {origin([result['made_by']])}; `benchmarks/results/noise.json`"
  words = "Noise whose gap ratio exceeded `null_ratio`; intervals of 95 %"
  return f"{words}:\n\n{table(head, rows)}\n\n*{made}.*"


def show_records() -> str:
  """What a large record takes to open and to report."""
  result = stored("records")
  cold, warm = result["report_not_cached"], result["report_cached"]
  opens = duration(result["file_not_cached"]["open_s"])
  made = f"`{result['made_by']['command']}`; {origin([result['made_by']])}; `benchmarks/results/records.json`"
  return (
    f"A record of {result['steps']:,} steps, {result['seeds']} seeds, {len(result['windows'])} windows and "
    f"{result['groups']} groups ({memory(result['file_bytes'])}) opens in {opens}, "
    f"and its page takes {duration(cold['seconds'])} from disk, {duration(warm['seconds'])} from the page cache and "
    f"{memory(max(cold['peak_memory_bytes'], warm['peak_memory_bytes']))} ({made})."
  )


# What stands in README.md between `<!-- name:begin -->` and `<!-- name:end -->`.
BLOCKS = {
  "benchmarks": show_devices,
  "fidelity": show_fidelity,
  "checkpoints": show_posthoc,
  "records": show_records,
}


def filled(text: str, name: str, content: str) -> str:
  """README.md with a block's content."""
  begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
  if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
    sys.exit(f"README.md has no place for the tables: it needs one line {begin} and after it one line {end}.")
  return f"{text[: text.index(begin)]}{begin}\n\n{content}\n\n{text[text.index(end) :]}"


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description="Rebuilds README.md's tables and benchmarks/RESULTS.md.")
  parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if one of them is out of date")
  args = parser.parse_args(argv)
  readme, results = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
  text = readme.read_text()
  for name, show in BLOCKS.items():
    text = filled(text, name, show())
  for file, new in ((readme, text), (results, show_results())):
    if file.exists() and file.read_text() == new:
      continue
    if args.check:
      sys.exit(f"{file.name} is out of date: run python benchmarks/report.py.")
    file.write_text(new)
    print(f"Wrote {file.relative_to(ROOT)}.")


if __name__ == "__main__":
  main(sys.argv[1:])
