"""The command line: `sedjax report`, `sedjax analyze`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from sedjax import _analyze_cli
from sedjax._dataset import storable

_INTERRUPTED = 130  # as shells count
_EPILOG = """examples:
  sedjax analyze 'run/step_*/model.safetensors' -o run.nc
  sedjax report run.nc -o report.html
"""
_REPORT_EPILOG = """example:
  sedjax report run.nc -o report.html

The page stands alone: it has its pictures inside and asks no host for anything. It is about the whole model and the
largest window; its tables have all groups and windows.
"""


def _parser() -> argparse.ArgumentParser:
  raw = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(
    prog="sedjax",
    description="Spectral edge dynamics: what a record or a folder of checkpoints says about a training run.",
    epilog=_EPILOG,
    formatter_class=raw,
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  report = commands.add_parser(
    "report",
    help="write a page that says in words what happened in a record",
    description="Writes one self-contained HTML page that says in words, with pictures, what happened in a record.",
    epilog=_REPORT_EPILOG,
    formatter_class=raw,
  )
  report.add_argument("record", help="file of a record (NetCDF), such as run.nc")
  report.add_argument("-o", "--out", required=True, metavar="PAGE", help="the page to write, such as report.html")
  report.add_argument("--window", type=int, help="window of the text and the pictures (default: the largest)")
  report.add_argument("--group", help="group of the text and the pictures (default: the whole model)")
  report.set_defaults(run=_report)
  analyze = commands.add_parser("analyze", help="make a record from a series of checkpoints")
  _analyze_cli.add_arguments(analyze)
  analyze.set_defaults(run=_analyze_cli.run)
  return parser


def _report(args: argparse.Namespace) -> int:
  from sedjax import _page

  # Also where the record is a journal yet, and its file is still to come.
  if args.out and os.path.realpath(args.out) == os.path.realpath(args.record):
    raise ValueError(f"sedjax report: the page cannot take the place of its record {args.record}; give another name.")
  with _page.open_record(args.record) as source:
    _page.write_page(source, args.out, name=os.path.basename(args.record), window=args.window, group=args.group)
  print(f"Wrote {storable(args.out)}.")
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: arguments; None for the program's own.

  Returns:
    0, or 1 after one sentence on stderr that says what is wrong, or 130 where it was interrupted. (Arguments that
    cannot be read end the program with exit code 2.)

  Example:
    >>> main(["report", "nowhere.nc", "-o", "page.html"])
    1
  """
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # names and help may have characters that the terminal has not
      stream.reconfigure(errors="backslashreplace")
  args = _parser().parse_args(argv)
  code, message = 1, ""
  try:
    code = args.run(args)
  except (ValueError, ImportError) as error:
    message = str(error)
  except OSError as error:
    message = f"{error.filename!r}: {error.strerror}." if error.filename and error.strerror else str(error)
  except KeyboardInterrupt:
    code, message = _INTERRUPTED, f"sedjax {args.command}: interrupted; run the same command again to go on."
  if message:
    print(message if message.startswith("sedjax") else f"sedjax: {message}", file=sys.stderr)
  if code == _INTERRUPTED and argv is None:
    # All that is to be kept is on disk. Python would now wait for the compiler's threads, or take itself apart beneath
    # them: now and then that hung or crashed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


if __name__ == "__main__":
  sys.exit(main())
