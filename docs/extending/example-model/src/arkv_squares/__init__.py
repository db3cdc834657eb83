"""A toy model for arkv: gray squares from random weights."""
