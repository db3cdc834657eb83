"""Prompts in, files out.

Nothing here knows how pictures come about.
"""
