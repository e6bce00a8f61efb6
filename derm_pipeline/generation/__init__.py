"""Prompts x seeds -> images, with one provenance row each. Sample i depends on its own seed and conditions only.

`plan`, `prompt_plans`: which samples. `texts`: what each is told in words. `drawing`: pixels, batch by batch,
resumable. `files`, `arrays`: what is written. `tones`: what came out. `folder`: all of it, for `derm generate`.
"""

from derm_pipeline.generation.arrays import write_grid, write_npz
from derm_pipeline.generation.drawing import check_requests, draw_batches, draw_samples, in_order
from derm_pipeline.generation.files import (
    captions_of,
    dataset_card,
    digest_of_pixels,
    encode_sample,
    encoded,
    provenance_rows,
    read_provenance,
    write_dataset,
    write_shards,
)
from derm_pipeline.generation.folder import OutputFormat, generate_folder, name_of, request_of
from derm_pipeline.generation.origins import Begun, OriginImages, ReadOrigin
from derm_pipeline.generation.plan import (
    Cell,
    ImageFormat,
    Origin,
    Prompting,
    SampleRequest,
    Sampling,
    SamplingConfig,
    diagnosis_called,
    num_train_images,
    num_unseen,
    plan_samples,
    requests_of_cells,
    sample_seed,
)
from derm_pipeline.generation.prompt_plans import (
    PLANS,
    AnySampling,
    CaptionSampling,
    Img2ImgSampling,
    LesionGenSampling,
    Prompt,
    PromptListSampling,
    PromptSampling,
    TrainingImage,
    plan_requests,
)
from derm_pipeline.generation.texts import caption_requests, looked_up_first, text_of_requests
from derm_pipeline.generation.told import EmbedText
from derm_pipeline.generation.tones import tone_counts

__all__ = [
    "PLANS",
    "AnySampling",
    "Begun",
    "CaptionSampling",
    "Cell",
    "EmbedText",
    "ImageFormat",
    "Img2ImgSampling",
    "LesionGenSampling",
    "Origin",
    "OriginImages",
    "OutputFormat",
    "Prompt",
    "PromptListSampling",
    "PromptSampling",
    "Prompting",
    "ReadOrigin",
    "SampleRequest",
    "Sampling",
    "SamplingConfig",
    "TrainingImage",
    "caption_requests",
    "captions_of",
    "check_requests",
    "dataset_card",
    "diagnosis_called",
    "digest_of_pixels",
    "draw_batches",
    "draw_samples",
    "encode_sample",
    "encoded",
    "generate_folder",
    "in_order",
    "looked_up_first",
    "name_of",
    "num_train_images",
    "num_unseen",
    "plan_requests",
    "plan_samples",
    "provenance_rows",
    "read_provenance",
    "request_of",
    "requests_of_cells",
    "sample_seed",
    "text_of_requests",
    "tone_counts",
    "write_dataset",
    "write_grid",
    "write_npz",
    "write_shards",
]
