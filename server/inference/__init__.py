"""The context, lease and measurements of every engine request."""
