"""How many rows of logits the loss computes at a time. Needs no torch: the memory sheet reads it.

Chunk sizes are in rows, not bytes: each extra chunk reads the weight twice more and adds to its gradient once more, and
this traffic has to be small compared with the chunk's matmuls, 6 FLOPs per row and weight element. CPU: measured in
docs/performance.md. GPU: adding a bf16 matmul to a float32 gradient moves 12 bytes per element, on an H200 the time of
2,100 FLOPs, which are 350 rows.
"""

from __future__ import annotations

_CPU_ROWS, _GPU_ROWS = 768, 4096
_ALIGN = 64  # rows: whole matmul tiles


def chunk_rows(rows: int, *, cpu: bool) -> int:
    """Rows of each chunk but the last: as few chunks of `rows` rows as possible, all of the same size; at least 1."""
    count = -(-rows // (_CPU_ROWS if cpu else _GPU_ROWS))
    return max(1, -(-rows // max(1, count * _ALIGN)) * _ALIGN)
