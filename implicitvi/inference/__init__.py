"""From a Pyro model to a fit: the guide, its settings, its set-up and its training."""
