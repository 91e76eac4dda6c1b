"""What a command would take, before it does any work: `besa prune`, `export`, `serve --plan`.

>>> from besa.pruning.config import PruneConfig
>>> plan = plan_prune("path/to/model", PruneConfig(out="pruned"), timed=False)
>>> plan.fits, plan.need.output < 10**6
(True, True)

A plan reads config.json and the headers of the weights, and needs no weights: a directory with a
config.json alone is planned by its skeleton. Bytes and operations come from pure functions of
shapes and settings (`block_costs`, `prune_memory`, `prune_work`), seconds from what two seconds of
measurement say of this machine (`speed`).
"""

from besa.planning.prune import PrunePlan, plan_prune

__all__ = ["PrunePlan", "plan_prune"]
