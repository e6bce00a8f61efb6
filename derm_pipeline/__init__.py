"""From real dermatology datasets to synthetic ones, with evidence of whom the synthetic data helps."""

__version__ = "0.1.0"
