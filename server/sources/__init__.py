"""Adapters from elsewhere: which places are allowed, and how an adapter is fetched from one."""
