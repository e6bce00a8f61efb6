"""Pixels => moments => latents: reading images in batches, shards of VAE moments, and their statistics.

Moments (mean and log-variance) are stored, not samples: noise is drawn and latents are whitened when they are used
(Karras et al. 2024, EDM2). This package does not know any autoencoder: it is handed one as a function.
"""

from derm_pipeline.latents.encoding import LatentConfig, encode_images
from derm_pipeline.latents.moments import INDEX, Moments, latent_statistics, load_moments, open_moments
from derm_pipeline.latents.pixels import ImageFile, Restore, orient, read_squares, to_model_range, to_pixels

__all__ = [
    "INDEX",
    "ImageFile",
    "LatentConfig",
    "Moments",
    "Restore",
    "encode_images",
    "latent_statistics",
    "load_moments",
    "open_moments",
    "orient",
    "read_squares",
    "to_model_range",
    "to_pixels",
]
