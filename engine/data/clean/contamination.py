"""Decontamination: finds documents that share an n-gram of words with an item of an evaluation file.

All numbers are equal (unless `fold_numbers` is off), because a question with other numbers is still that question. The
n-grams of the evaluation files are in memory as sorted hashes, 8 bytes each. Items shorter than n words cannot be found
this way; they are counted and reported.
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
    """N-gram hashes of all evaluation files. file_index: the file of each hash."""

    files: tuple[str, ...]
    words: int
    fold_numbers: bool
    hashes: U64  # ascending
    file_index: npt.NDArray[np.int32]  # int32 [len(hashes)]
    items: tuple[int, ...]  # of each file
    short_items: tuple[int, ...]  # of each file: shorter than `words`, so they cannot be found

    @classmethod
    def read(
        cls,
        files: Sequence[str],
        keys: Sequence[str],
        words: int,
        fold_numbers: bool,
        convert: Callable[[str], str] | None = None,
    ) -> EvaluationNgrams:
        """Read evaluation files. Raises DataError for any unreadable item, as it could not be searched for.

        convert: conversion of Chinese characters that is also applied to the documents; None for none.
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
                text = f"{file.name}: this evaluation file has no items, so documents cannot be compared with it."
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
        """(Evaluation file, shared n words) of the first n-gram in common with the text; None if there is none."""
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
    """The words of a text, and the hash of every n-gram of them."""
    if fold_numbers:
        words = words_and_numbers_of(text)
        return words, ngram_hashes_of_any_number(words, n)
    words = words_of(text)
    return words, ngram_hashes(words, n)


def evaluation_files(given: Sequence[str]) -> list[InputFile]:
    """The evaluation files. Raises DataError for missing or unreadable ones, before any work is done."""
    try:
        files = list_inputs(given).files
    except DataError as err:
        raise DataError(err.code, f"--decontaminate: {err}") from err
    read = [file for file in files if file.drop is None or file.drop.reason not in (own.REASON, "linked folder")]
    for file in read:
        if file.drop is not None:
            raise DataError("clean.evaluation-not-readable", f"evaluation file {file.drop}")
        if file.once:
            text = f"evaluation file {file.name}: is a pipe, but it has to be read more than once. Give a file."
            raise DataError("clean.evaluation-is-a-pipe", text)
    if given and not read:
        text = f"--decontaminate {' '.join(given)}: no evaluation file found. Check the path."
        raise DataError("clean.evaluation-not-found", text)
    return read
