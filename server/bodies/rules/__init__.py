"""What a body may ask for, beyond its size: messages by their role, and what is served at all."""
