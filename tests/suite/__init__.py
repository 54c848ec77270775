"""The accuracy suite: posteriors with known draws, methods to fit them, and what is measured; `accuracy.py` runs it."""
