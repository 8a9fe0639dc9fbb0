"""Data-parallel communication outside the forward pass: flat gradient buckets and the weight gathers of ZeRO-1.

Imports distributed. Never knows the layers that the parameters belong to, or the pipeline schedule.
"""
