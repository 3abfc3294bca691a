"""What is counted, what is read at a scrape, and the page."""
