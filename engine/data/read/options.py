"""What to read, as the options of a verb say it: the same for training a tokenizer, prepare and clean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.read.document_source import DocumentSource
from engine.data.read.own import Own


@dataclass(frozen=True)
class ReadOptions:
    """inputs: files, folders, globs, URLs, "-"; include and exclude: globs within folders; json_key: keys of the text.

    format: "" goes by the name of each file; on_error: "stop" at what cannot be read, or "skip" it.
    """

    inputs: Sequence[str | Path]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    json_key: Sequence[str] = ("text",)
    format: str = ""
    on_error: str = "stop"

    @property
    def skip_errors(self) -> bool:
        """Whether documents that cannot be read are left out and counted."""
        return self.on_error == "skip"

    def source(self, mine: Own, **how: Any) -> DocumentSource:
        """The documents. mine: what the call writes, which is no input; how: other fields of DocumentSource."""
        how = {"keys": tuple(self.json_key), "format": self.format, **how}
        return DocumentSource.of(self.inputs, self.include, self.exclude, mine, **how)
