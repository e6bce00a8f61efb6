"""A complete LLaVA-NeXT of tiny size with random weights: what the real loader reads, for tests and dry runs.

It has everything that the real one has (vision tower, tiles of any resolution, tokenizer, chat template, safetensors)
and knows nothing: its answers are noise, which the gate refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PATCH_PX, _IMAGE_PX = 14, 56
_TILES = [[_IMAGE_PX, 2 * _IMAGE_PX], [2 * _IMAGE_PX, _IMAGE_PX], [2 * _IMAGE_PX, 2 * _IMAGE_PX]]
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}[INST] {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} [/INST]{% endfor %}"
)
_TEXT = (
    "A dermoscopic image of a melanocytic nevus with light brown and dark brown colours and a regular border.",
    "A clinical image of a scaly, red, slightly raised plaque on medium brown skin.",
    "The lesion is symmetric, with a pigment network that fades towards the edge, and hairs are visible.",
    "Please describe the image using the following visual features, and other relevant details.",
    "Dots, globules, vessels, blue-grey veil, white scar-like area, surrounding skin, 0 1 2 3 4 5 6 7 8 9 mm.",
)


def write_tiny_llava_next(folder: Path, *, seed: int = 0) -> Path:
    """Write model, processor and tokenizer to a folder: under 2 MB, the same files for the same seed.

    Args:
        folder: Where to; made if it is not there, its files replaced.
        seed: Decides the weights.

    Returns:
        The folder, to be given as `LlavaNextConfig.model`.
    """
    import torch
    from transformers import LlavaNextForConditionalGeneration

    processor = _processor()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlavaNextForConditionalGeneration(_config(processor.tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _processor() -> Any:
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": _IMAGE_PX},
        crop_size={"height": _IMAGE_PX, "width": _IMAGE_PX},
        image_grid_pinpoints=_TILES,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=_tokenizer(),
        patch_size=_PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    unknown, start, end, pad, image = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        padding_side="left",
        extra_special_tokens=[image],
    )


def _config(tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

    width, heads = 32, 4
    common: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
    }
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**common, image_size=_IMAGE_PX, patch_size=_PATCH_PX, projection_dim=width),
        text_config=MistralConfig(
            **common,
            vocab_size=len(tokenizer),
            num_key_value_heads=2,
            head_dim=width // heads,
            max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=_TILES,
        tie_word_embeddings=False,
    )
