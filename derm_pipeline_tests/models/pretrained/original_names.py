"""A tiny Stable Diffusion or SDXL as its publishers write it: all weights in one file, in the original names."""

import re

import torch

from derm_pipeline_tests.models.test_pretrained_vae import original_name

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def whole_model(pipeline) -> dict[str, torch.Tensor]:
    """The state of a pipeline of one residual block a level in the original names."""
    state = {f"model.diffusion_model.{_unet_name(name)}": one for name, one in pipeline.unet.state_dict().items()}
    for name, tensor in pipeline.vae.state_dict().items():
        is_matrix = re.search(r"attentions.*to_\w+.*weight", name) is not None
        state[f"first_stage_model.{original_name(name)}"] = tensor[..., None, None] if is_matrix else tensor
    is_xl = hasattr(pipeline, "text_encoder_2")
    prefix = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    for name, tensor in pipeline.text_encoder.state_dict().items():
        state[f"{prefix}.transformer.text_model.{name}"] = tensor
    if is_xl:
        state |= {f"conditioner.embedders.1.model.{name}": one for name, one in _open_clip(pipeline.text_encoder_2)}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _unet_name(name: str) -> str:
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    if found:
        way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        side = "input" if way == "down" else "output"
        place = 1 + 2 * block + layer if way == "down" else 2 * block + layer
        if kind == "downsamplers":
            return f"input_blocks.{2 + 2 * block}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"output_blocks.{2 * block + 1}.1.{rest}"  # after a block that does not attend
        name = f"{side}_blocks.{place}.{int(kind == 'attentions')}.{rest}"
    for ours, theirs in _UNET.items():
        name = re.sub(rf"^{ours}\.", f"{theirs}.", name)
    for ours, theirs in _RESNET.items():
        name = re.sub(rf"((in|out)put_blocks\.\d\.0|middle_block\.[02])\.{ours}\.", rf"\1.{theirs}.", name)
    return name


def _open_clip(encoder):
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    yield "text_projection", state.pop("text_projection.weight").T
    for name in [name for name in state if ".q_proj." in name]:
        three = [state.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(three)
    for name, tensor in state.items():
        for ours, theirs in _OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        yield name, tensor
