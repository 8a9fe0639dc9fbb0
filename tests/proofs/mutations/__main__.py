"""Runs the mutations and reports which test caught which."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

from rich.console import Console
from rich.table import Column, Table

from . import MUTATIONS, __doc__
from .trial import attempt, built, healthy, preload


def main() -> int:
    """Run the suite; the exit code is 0 if every mutation was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these mutations only")
    parser.add_argument("--zoo", action="store_true", help="run the bugs of other projects only (docs/zoo.md)")
    parser.add_argument("--jobs", type=int, default=2, help="number of mutations to run in parallel")
    parser.add_argument("--without-extensions", action="store_true", help="run as if no extension were built")
    args = parser.parse_args()
    unknown = set(args.only or ()) - {m.name for m in MUTATIONS}
    if unknown:
        parser.error(f"no mutation named {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if (not args.only or m.name in args.only) and (m.threads or not args.zoo)]
    if not chosen:
        parser.error(f"none of them is in the zoo: {', '.join(args.only)}")
    console, begin = Console(), time.monotonic()
    extensions = built() and not args.without_extensions
    impossible = [m.name for m in chosen if m.path == "kernels" and not extensions]
    chosen = [m for m in chosen if m.name not in impossible]
    preload()
    if output := healthy(chosen, extensions):
        console.print(output, markup=False)
        console.print("the tests fail without any mutation: fix them first", style="bold red")
        return 1
    fold = partial(Column, overflow="fold")
    table = Table("mutation", fold("threads"), fold("caught by"), "s", title=f"{len(chosen)} mutations")
    threads = {m.name: " ".join(thread.rpartition("/")[2] for thread in m.threads) for m in chosen}
    outcomes = []
    for outcome in attempt(chosen, args.jobs, extensions):
        outcomes.append(outcome)
        console.print(f"{'caught' if outcome.caught else outcome.by}: {outcome.name}", markup=False, highlight=False)
    for outcome in outcomes:
        style = "" if outcome.caught else "bold red"
        by = outcome.by.replace("[", r"\[")
        table.add_row(outcome.name, threads[outcome.name], by, f"{outcome.seconds:.0f}", style=style)
    console.print(table)
    caught = sum(outcome.caught for outcome in outcomes)
    build = "with the extensions" if extensions else "without extensions"
    console.print(f"{caught} of {len(chosen)} caught {build} in {time.monotonic() - begin:.0f} s")
    if impossible:
        console.print(f"not tried, because their code runs only with built extensions: {', '.join(impossible)}")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
