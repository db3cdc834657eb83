"""A cache policy for arkv: attention that fades."""
