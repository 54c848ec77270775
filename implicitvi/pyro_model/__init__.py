"""Read a Pyro model: its sites, plates, parameters and log joint density."""
