"""What to read, as the options of a verb say it: the same for training a tokenizer, prepare and clean."""

from __future__ import annotations

from typing import Any, Literal

from engine.data.read.document_source import DocumentSource
from engine.data.read.own import OwnFiles
from engine.util.words import StrTuple


class ReadOptions:
    """Base of the options of a verb that reads documents; each declares these fields with a help of its own.

    input: files, folders, globs, URLs, "-"; include and exclude: globs within folders; json_key: keys of the text;
    format: "" goes by the name of each file; on_error: "stop" at what cannot be read, or "skip" it.
    """

    input: StrTuple
    include: StrTuple
    exclude: StrTuple
    json_key: StrTuple
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"]
    on_error: Literal["stop", "skip"]

    @property
    def skip_errors(self) -> bool:
        """Whether documents that cannot be read are left out and counted."""
        return self.on_error == "skip"

    def source(self, own_files: OwnFiles, **how: Any) -> DocumentSource:
        """The documents. mine: what the call writes, which is no input; how: other fields of DocumentSource."""
        how = {"keys": tuple(self.json_key), "format": self.format, **how}
        return DocumentSource.of(self.input, self.include, self.exclude, own_files, **how)
