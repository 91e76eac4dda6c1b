"""The pruning methods: what `--method` takes, and how the field writes it.

Each is the file of its name in `besa/pruning/methods/`. This list imports nothing, so that the
command line and the reports can have it without torch.
"""

METHODS = {
    "besa": "BESA",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "magnitude": "Magnitude",
}
