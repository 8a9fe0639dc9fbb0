"""AdamW over flat buckets, clipping from ShardSpecs, learning-rate schedules, precision."""
