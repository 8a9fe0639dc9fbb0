"""Options for reading documents, shared by `engine tokenizer train`, `prepare` and `clean`."""

from __future__ import annotations

from typing import Any, Literal

from engine.data.read.document_source import DocumentSource
from engine.data.read.own import OwnFiles
from engine.util.words import StrTuple


class ReadOptions:
    """Base of the options of the commands that read documents: the fields with their help texts.

    Each command declares these fields again, with its defaults and without a text.
    """

    input: StrTuple
    """files, folders, globs, pipes, URLs (s3://..., with fsspec) or - for standard input; plain or .gz .zst .bz2 .xz.
    .jsonl: one document per line; .json: an array or concatenated objects; .csv .tsv .parquet .arrow: one per row;
    other files: one per file, or per line if the first lines are JSON objects with the key"""
    include: StrTuple
    """inside folders, read only files whose names match one of these globs, such as '*.py' '*.rst'"""
    exclude: StrTuple
    """inside folders, skip files and subfolders whose names match one of these globs"""
    json_key: StrTuple
    """key or column of the text; a.b is b in the object a; several are joined by a newline into one document. The value
    may be a string, a list of strings (joined by newlines) or of messages {"role", "content"} (written as "role:
    content")"""
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"]
    """format of all inputs, if their names do not show it; not set: by the file name, and jsonl for standard input"""
    on_error: Literal["stop", "skip"]
    """for malformed JSON, a missing key, a wrong type, invalid UTF-8, a document that is too large or a damaged
    archive: stop with file and line, or skip the document, count it and list it"""

    @property
    def skip_errors(self) -> bool:
        """Whether documents that cannot be read are skipped and counted."""
        return self.on_error == "skip"

    def source(self, own_files: OwnFiles, **fields: Any) -> DocumentSource:
        """The documents. own_files: outputs of this command, which are not read; fields: others of DocumentSource."""
        fields = {"keys": tuple(self.json_key), "format": self.format, **fields}
        return DocumentSource.of(self.input, self.include, self.exclude, own_files, **fields)
