"""Model adapters, one file a family. They are found by name through the entry points `arkv.models`."""
