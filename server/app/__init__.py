"""How the server is put together and started."""
