"""What happens around one engine request."""
