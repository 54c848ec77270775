"""Compare draws with draws of a reference, and estimate the log evidence of data."""

from implicitvi.metrics.two_sample import c2st, knn_kl, mean_error, mmd, sd_ratio, sliced_wasserstein, whiten

__all__ = ["c2st", "knn_kl", "mean_error", "mmd", "sd_ratio", "sliced_wasserstein", "whiten"]
