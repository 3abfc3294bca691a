"""Every setting, described once; where settings are read from; the files that hold keys."""
