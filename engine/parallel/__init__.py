"""Data-parallel communication outside the forward pass: flat gradient buckets and the weight gathers of ZeRO-1.

Imports distributed. Independent of the layers that the parameters belong to and of the pipeline schedule.
"""
