"""Weights on their way from a file into a model: where they lie, how they are read, how they are packed.

Nothing here knows of caches.
"""
