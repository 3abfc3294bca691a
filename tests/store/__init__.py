"""The stores: what all of them do, and what only the shared one has to."""
