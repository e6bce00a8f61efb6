"""LoRA files: what is written is read again, by us and by the libraries that the forms come from."""

import copy
import json
import re
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from derm_pipeline.models.lora import LoraConfig, add_lora, take_lora
from derm_pipeline.models.lora_files import load_lora, read_lora, save_lora
from derm_pipeline.models.lora_forms import CONFIG, DIFFUSERS_WEIGHTS, save_diffusers, save_kohya, save_peft
from derm_pipeline.models.lora_names import network_of, original_name
from derm_pipeline_tests.models.lora_cases import filled

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "time_emb_proj")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
SETTINGS = {
    "alpha is not rank": {"alpha": 3.0},
    "rslora": {"alpha": 3.0, "rslora": True},
    "dora": {"alpha": 3.0, "dora": True},
}
LESSER = {name: settings for name, settings in SETTINGS.items() if name != "dora"}


@cache
def loaded(folder):
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def opened(folder):
    """A plain pipeline of its own, and its networks by part."""
    made = loaded(folder)
    pipeline = type(made)(**copy.deepcopy(made.components))
    pipeline.set_progress_bar_config(disable=True)
    networks = {"denoiser": getattr(pipeline, "unet", None) or pipeline.transformer}
    networks |= {
        part: getattr(pipeline, part) for part in ("text_encoder", "text_encoder_2") if getattr(pipeline, part, None)
    }
    return pipeline, networks


def adapted(folder, *, targets=ATTENTION, text=TEXT, **settings):
    """The same with adapters that change what it draws."""
    pipeline, networks = opened(folder)
    for part, network in networks.items():
        config = LoraConfig(rank=4, targets=targets if part == "denoiser" else text, **settings)
        add_lora(network, config)
        filled(network)
    return pipeline, networks


def drawn(pipeline):
    arguments = {"prompt": "melanoma on very dark skin", "num_inference_steps": 2, "height": 64, "width": 64}
    return pipeline(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent").images


def taken(networks):
    return {part: take_lora(network) for part, network in networks.items()}


def facts(networks):
    return {part: network_of(network) for part, network in networks.items()}


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["sd", "sdxl"])
def folder(request, tiny_pipelines):
    return tiny_pipelines[request.param]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_our_own_files_come_back_to_the_bit(folder, settings, tmp_path):
    pipeline, networks = adapted(folder, targets=WIDE, **settings)
    for part, network in networks.items():
        save_lora(tmp_path / f"{part}.safetensors", network)
    raw = load_file(tmp_path / "denoiser.safetensors")
    expected = get_peft_model_state_dict(networks["denoiser"])
    assert raw.keys() == expected.keys()
    assert all(torch.equal(raw[name], expected[name]) for name in raw)
    plain, fresh = opened(folder)
    before = drawn(plain)
    for part, network in fresh.items():
        load_lora(tmp_path / f"{part}.safetensors", {part: network})
    assert torch.equal(drawn(plain), drawn(pipeline))
    assert float((drawn(plain) - before).abs().max()) > 0.01
    assert fresh["denoiser"].peft_config["default"].target_modules == set(WIDE)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_forms_of_others_come_back(folder, form, settings, tmp_path):
    pipeline, networks = adapted(folder, targets=WIDE, **settings)
    path = tmp_path / "lora.safetensors"
    {"diffusers": save_diffusers, "kohya": save_kohya}[form](path, taken(networks), facts(networks))
    assert read_lora(path).form == form
    plain, fresh = opened(folder)
    load_lora(path, fresh)
    for part, lora in taken(networks).items():
        again = take_lora(fresh[part])
        assert again.layers.keys() == lora.layers.keys()
        for name in lora.layers:
            assert torch.equal(again.layers[name].up, lora.layers[name].up)
            assert again.scale(name) == pytest.approx(lora.scale(name), rel=1e-6)
    same(drawn(plain), drawn(pipeline))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_plain_pipeline_draws_as_ours_from_the_diffusers_form(folder, settings, tmp_path):
    text = TEXT if "dora" in settings else ("fc2",)  # of which diffusers takes no "lora_A"
    pipeline, networks = adapted(folder, targets=WIDE, text=text, **settings)
    save_diffusers(tmp_path / DIFFUSERS_WEIGHTS, taken(networks), facts(networks))
    plain, _ = opened(folder)
    plain.load_lora_weights(tmp_path)
    same(drawn(plain), drawn(pipeline))
    plain.unload_lora_weights()
    same(drawn(plain), drawn(opened(folder)[0]))


@pytest.mark.parametrize("settings", LESSER.values(), ids=LESSER)
def test_a_plain_pipeline_draws_as_ours_from_the_kohya_form(folder, settings, tmp_path):
    pipeline, networks = adapted(folder, targets=WIDE[:-2], **settings)
    save_kohya(tmp_path / "kohya.safetensors", taken(networks), facts(networks))
    plain, _ = opened(folder)
    plain.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    same(drawn(plain), drawn(pipeline))


def test_our_own_file_is_read_by_diffusers_network_too(tiny_pipelines, tmp_path):
    pipeline, networks = adapted(tiny_pipelines["sd"], targets=WIDE, text=("q_proj",), alpha=7.0)
    save_lora(tmp_path / "denoiser.safetensors", networks["denoiser"])
    plain, fresh = opened(tiny_pipelines["sd"])
    fresh["denoiser"].load_lora_adapter(tmp_path / "denoiser.safetensors", prefix=None, use_safetensors=True)
    save_lora(tmp_path / "text.safetensors", networks["text_encoder"])
    load_lora(tmp_path / "text.safetensors", {"text_encoder": fresh["text_encoder"]})
    same(drawn(plain), drawn(pipeline))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_peft_reads_our_folder_and_we_read_pefts(tiny_pipelines, settings, tmp_path):
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 32)}
    inputs |= {"timestep": torch.tensor([7]), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    def transformer():
        return PixArtTransformer2DModel.from_pretrained(tiny_pipelines["pixart"], subfolder="transformer").eval()

    network = transformer()
    add_lora(network, LoraConfig(rank=4, targets=(*ATTENTION, "proj", "linear", "proj_out"), **settings))
    with torch.no_grad():
        expected = filled(network)(**inputs).sample
        save_peft(tmp_path / "ours", take_lora(network), base=str(tiny_pipelines["pixart"] / "transformer"))
        theirs = PeftModel.from_pretrained(transformer(), tmp_path / "ours")
        same(theirs(**inputs).sample, expected)
        theirs.save_pretrained(tmp_path / "theirs")
        again = transformer()
        load_lora(tmp_path / "theirs", again)
        same(again(**inputs).sample, expected)


def test_the_kohya_names_are_those_of_published_files(tmp_path, tiny_pipelines):
    _, networks = adapted(tiny_pipelines["sd"])
    save_kohya(tmp_path / "sd.safetensors", taken(networks), facts(networks))
    names = load_file(tmp_path / "sd.safetensors").keys()
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{block}.lora_down.weight", f"{block}.lora_up.weight", f"{block}.alpha"} <= names
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in names
    _, networks = adapted(tiny_pipelines["sdxl"])
    save_kohya(tmp_path / "xl.safetensors", taken(networks), facts(networks))
    with safe_open(tmp_path / "xl.safetensors", "pt") as handle:
        names, metadata = set(handle.keys()), handle.metadata()
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_up.weight" in names
    assert "lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha" in names
    assert "lora_te2_text_model_encoder_layers_1_mlp_fc1.alpha" in names
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4.0")
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"


# Of stabilityai/stable-diffusion-xl-base-1.0, as sd-scripts' conversion map and published SDXL LoRAs have them.
SDXL_NAMES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v": "input_blocks.4.1.transformer_blocks.1.attn2.to_v",
    "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
    "mid_block.resnets.0.time_emb_proj": "middle_block.0.emb_layers.1",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block.1.transformer_blocks.9.ff.net.2",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_out.0": (
        "output_blocks.2.1.transformer_blocks.9.attn1.to_out.0"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.attentions.0.proj_out": "output_blocks.3.1.proj_out",
    "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    "conv_out": "out.2",
}


def shrunk(**changes):
    """A U-Net with SDXL's blocks and narrow layers."""
    settings = {
        "sample_size": 8,
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 8,
        "use_linear_projection": True,
        "norm_num_groups": 4,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 24 + 8,
    }
    torch.manual_seed(2)
    return UNet2DConditionModel(**settings | changes).eval()


def test_the_original_names_are_sdxls():
    network = shrunk()
    known = dict(network.named_modules())
    assert {name: original_name(name, network_of(network)) for name in SDXL_NAMES} == SDXL_NAMES
    assert SDXL_NAMES.keys() <= known.keys()


def test_every_adaptable_layer_of_sdxls_unet_has_a_kohya_name_that_comes_back(tmp_path):
    network = shrunk(transformer_layers_per_block=1)
    every = tuple(
        sorted({name for name, one in network.named_modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)})
    )
    add_lora(network, LoraConfig(rank=2, alpha=5, targets=every))
    lora = take_lora(filled(network))
    assert set(lora.layers) == set(every)
    save_kohya(tmp_path / "xl.safetensors", {"denoiser": lora}, {"denoiser": network_of(network)})
    again = shrunk(transformer_layers_per_block=1)
    load_lora(tmp_path / "xl.safetensors", again)
    inputs = (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 8))
    added = {"text_embeds": torch.randn(1, 8), "time_ids": torch.randn(1, 6)}
    theirs = shrunk(transformer_layers_per_block=1)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(tmp_path / "xl.safetensors", unet_config=theirs.config)
    theirs.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    with torch.no_grad():
        expected = network(*inputs, added_cond_kwargs=added).sample
        same(again(*inputs, added_cond_kwargs=added).sample, expected)
        same(theirs(*inputs, added_cond_kwargs=added).sample, expected)


def test_files_of_the_stock_scripts_are_read(tiny_pipelines, tmp_path):
    """diffusers' training scripts convert names before they save, and tell no alpha: it is the rank."""
    pipeline, networks = adapted(tiny_pipelines["sd"], targets=WIDE)
    converted = {
        prefix: convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
        for prefix, network in (("unet", networks["denoiser"]), ("text_encoder", networks["text_encoder"]))
    }
    type(pipeline).save_lora_weights(
        tmp_path, unet_lora_layers=converted["unet"], text_encoder_lora_layers=converted["text_encoder"]
    )
    plain, fresh = opened(tiny_pipelines["sd"])
    load_lora(tmp_path, fresh)
    same(drawn(plain), drawn(pipeline))


def test_files_from_before_peft_are_read(tiny_pipelines, tmp_path):
    pipeline, networks = adapted(tiny_pipelines["sd"], text=("q_proj", "out_proj"))
    old = {}
    for part, prefix, inner in (("denoiser", "unet", ".processor"), ("text_encoder", "text_encoder.text_model", "")):
        for name, layer in take_lora(networks[part]).layers.items():
            where, which = re.fullmatch(r"(.+?)\.(?:to_)?(q|k|v|out)(?:\.0|_proj)?", name).groups()
            old[f"{prefix}.{where}{inner}.to_{which}_lora.down.weight"] = layer.down
            old[f"{prefix}.{where}{inner}.to_{which}_lora.up.weight"] = layer.up
    save_file(old, tmp_path / "old.safetensors")
    plain, fresh = opened(tiny_pipelines["sd"])
    load_lora(tmp_path / "old.safetensors", fresh)
    same(drawn(plain), drawn(pipeline))


def test_a_linear_layer_written_as_a_convolution_is_read(tiny_pipelines, tmp_path):
    _, networks = adapted(tiny_pipelines["sdxl"])
    lora = take_lora(networks["denoiser"])
    save_kohya(tmp_path / "a.safetensors", {"denoiser": lora}, facts(networks))
    as_conv = {
        name: tensor[..., None, None].contiguous() if tensor.ndim == 2 else tensor
        for name, tensor in load_file(tmp_path / "a.safetensors").items()
    }
    save_file(as_conv, tmp_path / "b.safetensors")
    _, fresh = opened(tiny_pipelines["sdxl"])
    load_lora(tmp_path / "b.safetensors", fresh["denoiser"])
    again = take_lora(fresh["denoiser"])
    assert all(torch.equal(again.layers[name].down, lora.layers[name].down) for name in lora.layers)


def test_weights_can_be_written_in_half_precision_and_alphas_stay_whole(tiny_pipelines, tmp_path):
    _, networks = adapted(tiny_pipelines["sd"], alpha=3.0, rslora=True)
    save_kohya(tmp_path / "a.safetensors", taken(networks), facts(networks), dtype=torch.float16)
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert tensor.dtype == (torch.float32 if name.endswith(".alpha") else torch.float16)
        if name.endswith(".alpha"):
            assert float(tensor) == pytest.approx(3 * 4**0.5)


def test_pixart_has_no_kohya_form_and_says_so(tiny_pipelines, tmp_path):
    _, networks = adapted(tiny_pipelines["pixart"], text=("q", "wo"))
    with pytest.raises(ValueError, match="U-Nets of Stable Diffusion only, and this is a PixArtTransformer2DModel"):
        save_kohya(tmp_path / "a.safetensors", taken(networks), facts(networks))
    save_diffusers(tmp_path / "b.safetensors", taken(networks), facts(networks))
    assert list(tmp_path.iterdir()) == [tmp_path / "b.safetensors"]
    _, fresh = opened(tiny_pipelines["pixart"])
    load_lora(tmp_path / "b.safetensors", fresh)
    for part, lora in taken(networks).items():
        again = take_lora(fresh[part])
        assert all(torch.equal(again.layers[name].up, lora.layers[name].up) for name in lora.layers)


@pytest.fixture(scope="module")
def written(tiny_pipelines, tmp_path_factory):
    """A good file of ours, of the denoiser: tensors and metadata."""
    _, networks = adapted(tiny_pipelines["sd"], alpha=3.0)
    path = tmp_path_factory.mktemp("written") / "good.safetensors"
    save_lora(path, networks["denoiser"])
    with safe_open(path, "pt") as handle:
        return load_file(path), handle.metadata()


FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def refused(tensors, metadata, folder, tiny_pipelines, said):
    path = folder / "bad.safetensors"
    save_file(tensors, path, metadata=metadata)
    network = loaded(tiny_pipelines["sd"]).unet
    with pytest.raises(ValueError, match=said):
        load_lora(path, network)
    assert not hasattr(network, "peft_config")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{FIRST}.lora_A.weight": None}, "to_q is not complete: down is missing"),
        ({f"{FIRST}.lora_B.weight": (24, 5)}, r"attn1.to_q \(up\) is \(24, 5\) in the file and \(24, 4\)"),
        ({f"{FIRST}.lora_A.weight": (4,)}, r"has 1 axes; 2 or 4"),
        ({"conv_im.lora_A.weight": (4, 4), "conv_im.lora_B.weight": (4, 4)}, "no layer conv_im to adapt.*conv_in"),
        ({"conv_in.weight": (4, 4)}, "is no LoRA: it holds conv_in.weight"),
        ({"conv_in.hada_w1_a": (4, 4)}, "another kind than LoRA and DoRA, by conv_in.hada_w1_a"),
        ({"lora_unet_conv_in.lora_down.weight": (4, 4)}, "is of no one form: lora_unet_conv_in.* is kohya's, and"),
        ({f"{FIRST}.lora_magnitude_vector": (24,)}, "DoRA's magnitudes for some layers, and none for"),
        ({f"{FIRST}.lora_magnitude_vector": (1, 24)}, r"\(magnitude\) is \(1, 24\)"),
        ({f"{FIRST}.lora.down.weight": (4, 24)}, "holds down of .*attn1.to_q twice"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(changes, said, written, tmp_path, tiny_pipelines):
    tensors, metadata = written
    spoilt = {name: tensor for name, tensor in tensors.items() if name not in changes}
    spoilt |= {name: torch.ones(shape) for name, shape in changes.items() if shape is not None}
    refused(spoilt, metadata, tmp_path, tiny_pipelines, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 10**9}, "has rank 4, and its configuration says 1000000000"),
        ({"lora_alpha": "8"}, "alpha of .* is no number above 0"),
        ({"lora_alpha": -1}, "alpha of .* is no number above 0"),
        ({"lora_alpha": float("inf")}, "alpha of .* is no number above 0"),
        ({"alpha_pattern": {"(a+)+$": 2}}, r"alpha_pattern '\(a\+\)\+\$' is a regular expression"),
        ({"rank_pattern": 4}, "rank_pattern is no table"),
        ({"modules_to_save": ["conv_in"]}, "its configuration has modules_to_save"),
        ({"bias": "all"}, "its configuration has bias = 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "its configuration has init_lora_weights"),
        ({"peft_type": "IA3"}, "its configuration has peft_type"),
    ],
)
def test_a_configuration_from_anywhere_is_read_for_numbers_only(changes, said, written, tmp_path, tiny_pipelines):
    tensors, metadata = written
    config = json.loads(metadata[CONFIG]) | changes
    refused(tensors, metadata | {CONFIG: json.dumps(config)}, tmp_path, tiny_pipelines, said)


@pytest.mark.parametrize("text", ["no json", "[1]", "[" * 100_000])
def test_metadata_that_is_no_configuration_is_refused(text, written, tmp_path, tiny_pipelines):
    tensors, metadata = written
    refused(tensors, metadata | {CONFIG: text}, tmp_path, tiny_pipelines, "metadata of .* is no")


def test_pefts_form_without_an_alpha_asks_for_it(written, tmp_path, tiny_pipelines):
    tensors, _ = written
    refused(tensors, None, tmp_path, tiny_pipelines, "does not tell alpha, and no adapter_config.json")
    _, networks = opened(tiny_pipelines["sd"])
    found = load_lora(tmp_path / "bad.safetensors", networks["denoiser"], alpha=3.0)
    assert {layer.alpha for layer in found["denoiser"].layers.values()} == {3.0}


def test_adapters_of_networks_that_were_not_given_are_not_dropped_silently(tiny_pipelines, tmp_path):
    _, networks = adapted(tiny_pipelines["sd"])
    path = tmp_path / "both.safetensors"
    save_diffusers(path, taken(networks), facts(networks))
    _, fresh = opened(tiny_pipelines["sd"])
    with pytest.raises(ValueError, match="also has adapters for text_encoder: give that network, or ignore it"):
        load_lora(path, fresh["denoiser"])
    assert list(load_lora(path, fresh["denoiser"], ignore=("text_encoder",))) == ["denoiser"]
    save_diffusers(path, {"text_encoder": take_lora(networks["text_encoder"])}, facts(networks))
    with pytest.raises(ValueError, match="has adapters for text_encoder only, not for denoiser"):
        load_lora(path, {"denoiser": opened(tiny_pipelines["sd"])[1]["denoiser"]}, ignore=("text_encoder",))


def test_where_one_of_two_networks_does_not_fit_neither_is_changed(tiny_pipelines, tmp_path):
    _, networks = adapted(tiny_pipelines["sd"], text=("fc1",))
    loras = taken(networks)
    path = tmp_path / "both.safetensors"
    save_diffusers(path, loras, facts(networks))
    spoilt = load_file(path)
    first = next(name for name in spoilt if name.startswith("text_encoder"))
    save_file(spoilt | {first: torch.ones(4, 7)}, path)
    _, fresh = opened(tiny_pipelines["sd"])
    with pytest.raises(ValueError, match="text_encoder: encoder.layers.0.mlp.fc1"):
        load_lora(path, fresh)
    assert not any(hasattr(network, "peft_config") for network in fresh.values())


def test_what_is_no_safetensors_file_is_refused(tmp_path, tiny_pipelines):
    network = opened(tiny_pipelines["sd"])[1]["denoiser"]
    (tmp_path / "lora.bin").write_bytes(b"")
    (tmp_path / "lora.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ValueError, match="no .safetensors file; other weights can run code"):
        load_lora(tmp_path / "lora.bin", network)
    with pytest.raises(ValueError, match="no safetensors file, or a broken one"):
        load_lora(tmp_path / "lora.safetensors", network)
    with pytest.raises(FileNotFoundError, match="no file .*absent"):
        load_lora(tmp_path / "absent.safetensors", network)
    with pytest.raises(FileNotFoundError, match=f"neither adapter_model.safetensors nor {DIFFUSERS_WEIGHTS}"):
        load_lora(tmp_path, network)


@pytest.mark.parametrize("is_conv", [False, True])
@pytest.mark.parametrize("per_output", [False, True])
def test_doras_scale_of_lycoris_is_read_by_its_axis_where_inputs_are_as_many_as_outputs(is_conv, per_output, tmp_path):
    """One an input has the same numbers of a square layer, and means something else."""
    ones, kernel = ((1, 1), (3, 3)) if is_conv else ((), ())
    scale = torch.rand(6, 1, *ones) if per_output else torch.rand(1, 6, *ones)
    tensors = {"lora_down.weight": torch.randn(2, 6, *kernel), "lora_up.weight": torch.randn(6, 2, *ones)}
    tensors |= {"dora_scale": scale, "alpha": torch.tensor(2.0)}
    path = tmp_path / "square.safetensors"
    save_file({f"lora_unet_conv2.{name}": tensor for name, tensor in tensors.items()}, path)
    if per_output:
        assert torch.equal(read_lora(path).parts["denoiser"].layers["conv2"].magnitude, scale.flatten())
        return
    with pytest.raises(ValueError, match=r"conv2 \(magnitude\) is \(1, 6.*one number for each output is read"):
        read_lora(path)
