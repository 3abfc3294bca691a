"""What every request passes, from the outermost in: access control, drain, adapter routing."""
