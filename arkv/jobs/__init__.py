"""What is to be drawn and how, in words that a file can hold.

Nothing here knows who draws.
"""
