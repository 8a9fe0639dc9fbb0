"""Documents that hold questions of an evaluation: found by a run of n words in common.

Any number counts as any other (unless `fold_numbers` is off), as a question whose numbers were changed is still the
question. The n-grams of the evaluation files are held as sorted hashes (8 bytes each). An item shorter than n words
cannot be found this way; it is counted, so that nobody takes silence for cleanliness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.data.clean.ngrams import U64, ngram_hashes, ngram_hashes_of_any_number, words_and_numbers_of, words_of
from engine.data.read import own
from engine.data.read.document_source import DocumentSource
from engine.data.read.inputs import InputFile, list_inputs
from engine.errors import DataError


@dataclass(frozen=True)
class EvaluationNgrams:
    """What must not be in the training data. `file_index`: which file each hash is from."""

    files: tuple[str, ...]
    words: int
    fold_numbers: bool
    hashes: U64  # ascending
    file_index: npt.NDArray[np.int32]  # int32 [len(hashes)]
    items: tuple[int, ...]  # of each file
    short_items: tuple[int, ...]  # of each file: shorter than `words`, not looked for

    @classmethod
    def read(
        cls,
        files: Sequence[str],
        keys: Sequence[str],
        words: int,
        fold_numbers: bool,
        convert: Callable[[str], str] | None = None,
    ) -> EvaluationNgrams:
        """Read evaluation files; any fault in them stops, as what is not read would not be looked for.

        `convert`: what was done to the documents' characters.
        """
        hashes, file_indices = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        names: list[str] = []
        items: list[int] = []
        short: list[int] = []
        for file in evaluation_files(files):
            grams_of_file, count, too_short = [np.empty(0, np.uint64)], 0, 0
            for batch in DocumentSource((file,), tuple(keys)).batches():
                for drop in batch.drops:
                    if drop.stops:
                        raise DataError("clean.evaluation-not-readable", f"evaluation file {drop}")
                for text in batch.texts:
                    grams = _grams(convert(text) if convert else text, words, fold_numbers)[1]
                    count, too_short = count + 1, too_short + (not grams.size)
                    grams_of_file.append(grams)
            if not count:
                text = f"{file.name}: this evaluation file has no items, so nothing can be looked for."
                raise DataError("clean.evaluation-empty", text)
            hashes.append(np.concatenate(grams_of_file))
            file_indices.append(np.full(hashes[-1].size, len(names), np.int32))
            names, items, short = [*names, file.name], [*items, count], [*short, too_short]
        unique_hashes, index = np.unique(np.concatenate(hashes), return_index=True)
        return cls(
            tuple(names),
            words,
            fold_numbers,
            unique_hashes,
            np.concatenate(file_indices)[index],
            tuple(items),
            tuple(short),
        )

    def find_overlap(self, text: str) -> tuple[str, str] | None:
        """The evaluation file, and the words that it has in common with the text; None if there are none."""
        if not self.hashes.size:
            return None
        words, grams = _grams(text, self.words, self.fold_numbers)
        if not grams.size:
            return None
        at = np.minimum(np.searchsorted(self.hashes, grams), self.hashes.size - 1)
        hits = np.flatnonzero(self.hashes[at] == grams)
        if not hits.size:
            return None
        first = int(hits[0])
        return self.files[int(self.file_index[at[first]])], " ".join(words[first : first + self.words])


def _grams(text: str, n: int, fold_numbers: bool) -> tuple[list[str], U64]:
    """The words of a text, and the hashes of every n of them in a row."""
    if fold_numbers:
        words = words_and_numbers_of(text)
        return words, ngram_hashes_of_any_number(words, n)
    words = words_of(text)
    return words, ngram_hashes(words, n)


def evaluation_files(given: Sequence[str]) -> list[InputFile]:
    """The files to read; one that is missing or cannot be read is told before any work is done."""
    try:
        files = list_inputs(given).files
    except DataError as err:
        raise DataError(err.code, f"--decontaminate: {err}") from err
    read = [file for file in files if file.drop is None or file.drop.reason not in (own.REASON, "linked folder")]
    for file in read:
        if file.drop is not None:
            raise DataError("clean.evaluation-not-readable", f"evaluation file {file.drop}")
        if file.once:
            text = f"evaluation file {file.name}: is a pipe, and is read more than once. Give a file."
            raise DataError("clean.evaluation-is-a-pipe", text)
    if given and not read:
        text = f"--decontaminate {' '.join(given)}: no evaluation file there. Check the path."
        raise DataError("clean.evaluation-not-found", text)
    return read
