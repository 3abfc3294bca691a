"""Names and versions: which one is active, who may use it, and every change to them."""
