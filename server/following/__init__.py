"""A store that many servers share: this server keeps up with what others change."""
