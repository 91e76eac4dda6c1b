"""The pruning methods and updates: what `--method` and `--update` take, as the field writes them.

Each method is the file of its name in `besa/pruning/methods/`, each update but `none` that of its
name in `besa/pruning/updates/`. These lists import nothing, so that the command line and the
reports can have them without torch.
"""

METHODS = {
    "besa": "BESA",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "magnitude": "Magnitude",
}

UPDATES = {
    "none": "none",
    "obs": "OBS",
    "admm": "ADMM",
}
