"""Processes: children that are never left behind, and what the processes of a server use."""
