"""Metrics: event counters, the state read at a scrape, and the page."""
