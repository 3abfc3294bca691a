"""Every setting, described once; the sources that settings are read from; the files that hold keys."""
