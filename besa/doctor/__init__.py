"""What `besa doctor` finds out: the machine, what is installed on it, and how fast it is."""
