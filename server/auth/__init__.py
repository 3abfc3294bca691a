"""Authentication: keys, the origin of requests without a key, rate limits."""
