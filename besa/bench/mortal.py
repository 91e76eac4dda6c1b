"""To be imported by a process that only forks others: it ends with its parent, and they with it."""

import os

from besa.bench.child import die_with_parent

die_with_parent()
os.register_at_fork(after_in_child=die_with_parent)
