"""Mathematics, written once: tensors only, no models."""
