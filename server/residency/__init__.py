"""Which adapter is where (disk, host, device), who waits, who is evicted."""
