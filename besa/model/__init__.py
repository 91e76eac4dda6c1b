"""A decoder on disk and in memory: its files, its blocks, the directory that it is written to."""
