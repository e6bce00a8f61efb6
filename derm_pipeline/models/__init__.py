"""Networks, the noise laws that train them and the samplers that use them.

Dimension alphabet of every signature, docstring and comment in this package:

    n  batch            c  channels         h w  height and width of an image or latent
    t  tokens           d  features         f    downsampling of the autoencoder (pixels per latent cell)

Images are float (n, 3, h, w) in [-1, 1]; latents are float (n, c, h/f, w/f), whitened to about mean 0 and deviation 1.
A network's *time* is a float (n,) in [0, 1000], 0 clean and 1000 noise, whichever law trains it.
Networks know nothing of noise, and laws and samplers know nothing of networks: they meet as `denoise(x, time)`.
"""
