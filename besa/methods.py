"""The pruning methods and updates: what `--method` and `--update` take, as the field writes them.

Each method is the file of its name in `besa/pruning/methods/`. Of the updates, `obs` and `admm` are
those in `besa/pruning/updates/`, `learn` is `besa/pruning/kept_weights.py`, and `auto` leaves the
choice to `besa/pruning/guard.py`. These lists import nothing, so that the command line and the
reports can have them without torch.
"""

METHODS = {
    "besa": "BESA",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "magnitude": "Magnitude",
}

UPDATES = {
    "auto": "guarded updates",
    "none": "none",
    "obs": "OBS",
    "admm": "ADMM",
    "learn": "learned weights",
}
