"""What the server asks of an engine, and the real one."""
