"""Command-line options of `engine merge-datasets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass
class MergeDatasets:
    """Join tokenised corpora (.bin/.idx) to one, end to end: bitwise what Megatron-LM's tools/merge_datasets.py writes.

    Sidecars (.json) are made anew where all corpora have one. Nothing is there under the output's name before all is.
    """

    input: tuple[str, ...]
    """prefixes in the order wanted, or folders, of which every PREFIX.bin/.idx is taken, sorted by name"""
    output_prefix: Annotated[str, tyro.conf.arg(aliases=("--output",))]
    """prefix of what is written: OUTPUT.bin, OUTPUT.idx, OUTPUT.json"""
    multimodal: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """the corpora have modes (Megatron-LM's multimodal .idx); join them too"""
    overwrite: bool = False
    """replace files that are there"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""
