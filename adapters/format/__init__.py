"""FORMAT.md: an adapter's folder, read and checked."""
