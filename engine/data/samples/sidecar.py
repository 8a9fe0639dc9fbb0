"""PREFIX.json of a corpus: fields that .bin/.idx lack, so that mixed-up files raise an error before training."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

SIDECAR_VERSION = 1
SIDECAR_DIGEST = "sidecar_digest"

IntArray = npt.NDArray[Any]


def entropy(counts: IntArray) -> float:
    """Entropy in nats per token of a histogram int64 [V]; 0.0 for an empty one."""
    total = int(counts.sum())
    if total == 0:
        return 0.0
    p = counts[counts > 0] / total
    return float(-(p * np.log(p)).sum()) + 0.0  # + 0.0: a single distinct token would print as -0.0


def sidecar_of(
    meta: dict[str, Any], dtype: np.dtype[Any], counts: IntArray, documents: int, empty: int
) -> dict[str, Any]:
    """Content of the sidecar: `meta`, and fields computed from the token histogram `counts` int64 [vocab_size]."""
    used = np.flatnonzero(counts)
    num_tokens = int(counts.sum())
    return {
        **meta,
        "version": SIDECAR_VERSION,
        "num_documents": documents,
        "num_empty_documents": empty,
        "num_tokens": num_tokens,
        "max_token": int(used[-1]) if used.size else -1,
        "bin_bytes": num_tokens * dtype.itemsize,
        "dtype": dtype.name,
        "vocab_size": len(counts),
        "unigram_entropy": entropy(counts),
    }


def sidecar_bytes(sidecar: dict[str, Any]) -> bytes:
    return json.dumps({**sidecar, SIDECAR_DIGEST: sidecar_digest(sidecar)}, indent=1).encode() + b"\n"


def sidecar_digest(sidecar: dict[str, Any]) -> str:
    """Digest of all other fields of a sidecar."""
    fields = {name: value for name, value in sidecar.items() if name != SIDECAR_DIGEST}
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())
