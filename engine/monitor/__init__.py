"""What a person sees of a run: metrics, progress, health, spikes, pictures.

Imports what it looks at: config, distributed, ops, pipeline, the score of a validation. Never changes what it looks at,
and never knows the loop that calls it.
"""
