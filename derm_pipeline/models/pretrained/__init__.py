"""Pretrained text-to-image models as generators: Stable Diffusion 1.x and 2.x, SDXL, PixArt-alpha and -sigma.

A *base* is the whole pretrained pipeline that a recipe starts from: denoiser, text encoders with tokenizers, VAE and
noise law. The networks are diffusers' and transformers' own classes; what is here brings them to the project's
interface, so that laws, guidance, samplers and training work with them as with any other network:

    base = load_base(PretrainedConfig(model="stable-diffusion-v1-5/stable-diffusion-v1-5"), device)
    network = PretrainedNetwork(base.network_config(latent_size=64), base.denoiser)
    network.set_null(base.null())
    told = base.embed(["a photo of a melanoma"])            # {"text", "text_mask"}, and "pooled" for SDXL
    latents = sample(guided(network, told, 7.5), base.law, noise, num_steps=30)
"""
