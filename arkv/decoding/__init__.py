"""The loop of one batch: memory, steps, graphs, and how a token is drawn.

Nothing here knows of prompts, files or pictures.
"""
