"""Which adapters a list has, and in which order."""
