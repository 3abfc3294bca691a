"""The store that many servers share: a log of changes that is only ever appended to."""
