"""`python -m tests.zoo`: trains every model of the zoo under the library, compares, and writes docs/architectures.md.

Results are kept in bench/results/zoo.jsonl, a line for each entry; with --only, those of other entries stay as they were. Exit code 4 when
any loss, gradient or buffer differs from eager code.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import warnings

import torch
import transformers

from fxopt.passes.fuse import rules
from tests.zoo import page, pool
from tests.zoo.examine import MODES, Result, examine
from tests.zoo.table import ZOO

WRONG = 4


def line(result: Result) -> str:
    """One entry in a line of the terminal."""
    ops = ", ".join(f"{number} {name}" for name, number in sorted(result.ops.items()))
    errors = "; ".join(f"{check} {max(e for e, _ in steps):.0e} {max(g for _, g in steps):.0e}" for check, steps in result.errors.items())
    told = result.reason or result.refused_adapters
    return f"{result.name:34} {result.captured:9} {result.seconds:5.1f} s  {errors:32} {ops}{'  | ' + told[:160] if told else ''}"


def main() -> int:
    """Reads the command line, examines, writes."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression, searched in the names of entries and families")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one entry")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="in which dtypes places are counted")
    parser.add_argument("--list", action="store_true", help="print the names only")
    options = parser.parse_args()
    pattern = re.compile(options.only, re.IGNORECASE)
    entries = [entry for entry in ZOO.values() if pattern.search(entry.name) or options.only and pattern.search(entry.family)]
    if options.list:
        print("\n".join(entry.name for entry in entries))
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rules()  # the patterns are traced once: not a cost of the first model
    results = page.kept()
    for result in pool.run(entries, options.jobs, options.limit, functools.partial(examine, modes=tuple(options.modes))):
        results[result.name] = result
        page.keep(results)
        print(line(result), flush=True)
        for wrong in result.wrong:
            print(f"    WRONG  {wrong}", flush=True)
    results = page.kept()
    page.PAGE.write_text(page.page(results))
    print("\n".join(page.summary(results)))
    return WRONG if any(results[entry.name].wrong for entry in entries) else 0


if __name__ == "__main__":
    sys.exit(main())
