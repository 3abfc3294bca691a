"""The grammars that requests ask for: bounded first, then tried in a process that can be killed."""
