"""Packing encoded documents: the native function equals the numpy reference, and rejects out-of-bounds arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine.data.prepare.pack as pack_module
from engine.data.prepare.pack import pack, pack_reference
from tests.support.corpora import BUILT

VOCAB_SIZE = 7


native = pytest.mark.skipif(not BUILT, reason="engine._index is not built")


@native
@given(
    documents=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5), max_size=8),
    eod=st.sampled_from([None, 0, VOCAB_SIZE - 1]),
    dtype=st.sampled_from(["<u2", "<i4"]),
)
def test_native_is_the_reference(documents: list[list[int]], eod: int | None, dtype: str) -> None:
    tokens = np.array([token for document in documents for token in document], np.int32)
    lengths = np.array([len(document) for document in documents], np.int32)
    results = []
    for function in (pack, pack_reference):
        counts = np.ones(VOCAB_SIZE, np.int64)
        packed, written, wrong = function(tokens, lengths, eod, np.dtype(dtype), counts)
        assert wrong is None and packed.dtype == np.dtype(dtype) and written.dtype == np.int32
        results.append((packed.tolist(), written.tolist(), counts.tolist()))
    end = [] if eod is None else [eod]
    by_hand = [token for document in documents if document for token in document + end]
    assert results[0] == results[1] and results[0][0] == by_hand
    assert results[0][2] == (1 + np.bincount(np.array(by_hand, int), minlength=VOCAB_SIZE)).tolist()


@pytest.mark.parametrize("wrong", [-1, VOCAB_SIZE, 2**31 - 1, -(2**31)])
def test_an_id_outside_the_vocabulary_is_returned(wrong: int) -> None:
    tokens, lengths = np.array([1, wrong, 2], np.int32), np.array([2, 1], np.int32)
    for function in (pack, pack_reference):
        counts = np.zeros(VOCAB_SIZE, np.int64)
        assert function(tokens, lengths, 0, np.dtype("<u2"), counts)[2] == wrong


@native
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lengths": np.array([4], np.int32)}, IndexError),  # more than the number of tokens
        ({"lengths": np.array([-1, 4], np.int32)}, ValueError),
        ({"out": np.zeros(3, np.uint16)}, IndexError),  # no space for the end token
        ({"out": np.zeros(4, np.int64)}, ValueError),
        ({"out": np.zeros(8, np.uint16)[::2]}, ValueError),
        ({"tokens": np.array([1, 2, 3], np.int64)}, ValueError),
        ({"counts": np.zeros(65537, np.int64)}, ValueError),  # too large for uint16
        ({"counts": np.zeros(VOCAB_SIZE, np.int32)}, TypeError),  # counts would go into a converted copy and be lost
    ],
)
def test_native_rejects_out_of_bounds_arguments(change: dict[str, Any], error: type[Exception]) -> None:
    arguments: dict[str, Any] = {
        "tokens": np.array([1, 2, 3], np.int32),
        "lengths": np.array([3], np.int32),
        "eod": 0,
        "out": np.zeros(4, np.uint16),
        "counts": np.zeros(VOCAB_SIZE, np.int64),
    }
    module: Any = pack_module.native_index()
    assert module.pack(**arguments) is None and arguments["out"].tolist() == [1, 2, 3, 0]
    with pytest.raises(error):
        module.pack(**{**arguments, **change})
