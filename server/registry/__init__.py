"""Names and versions: which is active, who may use it, and every change to that."""
