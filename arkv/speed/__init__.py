"""How fast it is: benchmarks, what they are compared with, and figures of it."""
