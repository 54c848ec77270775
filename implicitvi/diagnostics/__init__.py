"""Judge the draws of a finished fit."""
