"""The report of `engine clean` as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show_clean_report(report: dict[str, Any]) -> None:
    """Print the counts of kept, dropped and found documents, each with its first sample. report: of data.clean."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table("result", "documents", "text (MB)", "first example")
    table.add_row("read", f"{report['documents_in']:,}", _mb(report["text_bytes_in"]), "")
    for reason, count in report["dropped"].items():
        size = report["dropped_text_bytes"].get(reason, 0)
        table.add_row(f"dropped: {reason}", f"{count:,}", _mb(size), _example(report, f"dropped: {reason}"))
    table.add_row("kept", f"{report['documents_kept']:,}", _mb(report["text_bytes_kept"]), "", style="bold")
    console.print(table)
    for kind, count in report["noticed"].items():
        console.print(f"noticed: {count:,} {kind}; the first: {_example(report, f'noticed: {kind}')}")
    if report["why_no_documents"]:
        console.print(report["why_no_documents"], markup=False)
    if report["changed"]:
        console.print(f"documents changed: {_counts(report['changed'])}", markup=False)
    for names, documents in report["renamed_columns"].items():
        console.print(
            f"column renamed, because clean writes a column of that name: {names}, in {documents:,} documents",
            markup=False,
        )
    if report["quality_languages"]:
        console.print(
            f"documents checked by the quality rules of each language: {_counts(report['quality_languages'])}",
            markup=False,
        )
    if report["not_applied"]:
        left = _counts(report["not_applied"])
        console.print(f"documents kept unchecked because a rule does not support their language: {left}", markup=False)
    if report["pii"]["mode"] != "off":
        found = Table("personal data", "findings", "documents", "first example")
        for kind, count in report["pii"]["findings"].items():
            found.add_row(kind, f"{count:,}", f"{report['pii']['documents'][kind]:,}", _example(report, f"pii: {kind}"))
        done = {"report": "kept", "mask": "masked", "drop": "dropped with its documents"}[report["pii"]["mode"]]
        console.print(found if found.row_count else "no personal data found", markup=False)
        if found.row_count:
            console.print(f"personal data was {done}", markup=False)
    for entry in report["evaluations"]:
        console.print(
            f"evaluation file {entry['file']}: {entry['items']:,} items, "
            f"{entry['documents_dropped']:,} documents dropped, "
            f"{entry['too_short_to_look_for']:,} items too short to search for",
            markup=False,
        )
    console.print(f"wrote {report['output']} in {report['elapsed_s']:.1f} s", markup=False)


def _counts(table: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in table.items())


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f}"


def _example(report: dict[str, Any], kind: str) -> str:
    from rich.markup import escape

    samples = report["samples"].get(kind, [])
    if not samples:
        return ""
    first = samples[0]
    place = f"{first['file']}:{first['record']}" if first["record"] else first["file"]
    text = " ".join((first.get("detail") or first.get("text") or "").split())
    return escape(f"{place} {text[:60]}")
