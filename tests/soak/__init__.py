"""Long runs that look for what only time shows: a kill at any moment, a leak. Tests take the short form of them,
`make soak` the full one."""
