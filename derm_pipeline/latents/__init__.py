"""Pixels => moments => latents: reading images in batches, shards of VAE moments, their statistics; text embeddings.

Moments (mean and log-variance) are stored, not samples: noise is drawn and latents are whitened when they are used
(Karras et al. 2024, EDM2). This package does not know any autoencoder or text encoder: it is handed one as a function.
"""

from derm_pipeline.latents.encoding import LatentConfig, encode_images
from derm_pipeline.latents.moments import INDEX, Moments, latent_statistics, load_moments, open_moments
from derm_pipeline.latents.pixels import ImageFile, Restore, orient, read_squares, to_model_range, to_pixels
from derm_pipeline.latents.text_cache import Embeddings, open_embeddings, write_embeddings

__all__ = [
    "INDEX",
    "Embeddings",
    "ImageFile",
    "LatentConfig",
    "Moments",
    "Restore",
    "encode_images",
    "latent_statistics",
    "load_moments",
    "open_embeddings",
    "open_moments",
    "orient",
    "read_squares",
    "to_model_range",
    "to_pixels",
    "write_embeddings",
]
