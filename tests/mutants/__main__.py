"""All mutants, and the table of docs/mutants.md: `PYTHONPATH=tests python -m mutants`."""

from __future__ import annotations

import sys
import time
from collections import Counter

import torch
from house import ROOT

from mutants.hunt import MUTANTS, Verdict, hunt
from mutants.search import Found, search, searchable

_HEAD = """# Mutants

Planted wrong rewrites, and whether a certificate (docs/verify.md) catches each: `make mutants` plants all and writes this page.
A **graph** mutant is a wrong edit of a captured graph; a **pass** mutant is a real pass with one of its rewrites made wrong; an
**op** mutant is a rewrite into a fused op that computes something else. The mutants are data: `tests/mutants/`.

Changes that nothing could observe are not planted. Those that came up, and why they are equivalent: a fused op's fault in an argument
that the program leaves at the very value which the fault sets; rope's inverse in place of its transpose (of a rotation they are
one); a write into a value that nobody reads again; the bias of a key projection (it adds one number to all scores of a query, which softmax
takes out); a detach where nothing upstream is trained. The same people wrote the mutants and the certificate: a catch rate here says that these
kinds of mistakes are seen, not that all are.
"""


def table(verdicts: dict[str, Verdict], found: dict[str, Found], seconds: float) -> str:
    """The page."""
    caught = sum(bool(verdict.by) for verdict in verdicts.values())
    kinds = Counter(mutant.kind for mutant in MUTANTS.values())
    by = Counter(verdict.by or "not caught" for verdict in verdicts.values())
    lines = [_HEAD, f"**{caught} of {len(verdicts)} are caught** ({100 * caught / len(verdicts):.1f}%): {', '.join(f'{n} by {how}' if how != 'not caught' else f'{n} not' for how, n in by.most_common())}; "
             f"{', '.join(f'{n} {kind}' for kind, n in kinds.items())}; {seconds / len(verdicts):.1f} s each on one core, shared.", ""]
    both = sum(each.pass_ and each.site for each in found.values())
    scripts = sum(bool(each.lines) for each in found.values())
    tried = sum(each.tried for each in found.values()) / max(len(found), 1)
    lines += [f"**Bisecting names the exact pass and site of {both} of {len(found)}** sabotaged passes and ops ({100 * both / max(len(found), 1):.1f}%), by judging {tried:.1f} programs on average; "
              f"for {scripts} of them it writes a script of under 60 lines. A change that hits no rewrite of the pass is a rewrite of its own, behind the others. The scripts of sabotaged ops "
              "import the wrong function from `mutants.passes`. A pass that changes the function by design (`lora`, `quantize`, `precision`) gets none: there is nothing to be equal to but its formula.", "",
              "| kind | mutant | caught by | on case | bisected |", "|---|---|---|---|---|"]
    for name, verdict in verdicts.items():
        said = found.get(name)
        where = "" if said is None else f"{'pass' if said.pass_ else 'wrong pass'}, {'site' if said.site else 'wrong site'} of {said.of}" + (f", {said.lines} lines" if said.lines else "")
        lines.append(f"| {MUTANTS[name].kind} | {name.replace('|', '/')} | {verdict.by or '**no**'} | {verdict.case} | {where} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Plant, certify, bisect, write."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    verdicts = {}
    for name, mutant in MUTANTS.items():
        verdicts[name] = hunt(mutant)
        print(f"{verdicts[name].by or 'NOT CAUGHT':10} {name}", flush=True)
    seconds = time.perf_counter() - start
    found = {}
    for name, mutant in MUTANTS.items():
        if searchable(mutant) and verdicts[name].by:
            found[name] = search(mutant)
            print(f"{'named' if found[name].pass_ and found[name].site else 'NOT NAMED':10} {name}", flush=True)
    (ROOT / "docs/mutants.md").write_text(table(verdicts, found, seconds))
    missed = [name for name, verdict in verdicts.items() if not verdict.by]
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} caught; docs/mutants.md is written")
    return 1 if len(missed) > len(verdicts) / 100 else 0


if __name__ == "__main__":
    sys.exit(main())
