"""Cache policies, one file each. They are found by name through the entry points `arkv.policies`."""
