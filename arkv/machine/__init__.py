"""The machine below: what it is, how much memory is free, clocks, gauges, energy.

Nothing here knows of anything else in the package but models.
"""
