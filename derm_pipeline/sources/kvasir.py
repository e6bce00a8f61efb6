"""Kvasir: endoscopic images of eight findings (Pogorelov et al. 2017), as a folder a class. Med-Art learns them."""

from __future__ import annotations

from typing import Final

from derm_pipeline.records import Diagnosis, Modality
from derm_pipeline.sources.imagefolder import ImageFolder, ImageFolderConfig

KVASIR: Final = ImageFolder(
    name="kvasir",
    title="Kvasir",
    licence="research and educational use, with citation",
    citation=(
        "Pogorelov et al.: KVASIR: a multi-class image dataset for computer aided gastrointestinal disease detection. "
        "MMSys 2017, doi:10.1145/3083187.3083212"
    ),
    homepage="https://datasets.simula.no/kvasir",
    settings=ImageFolderConfig(
        modality=Modality.ENDOSCOPIC,
        malignant=False,
        diagnoses={
            "dyed-lifted-polyps": Diagnosis.DYED_LIFTED_POLYPS,
            "dyed-resection-margins": Diagnosis.DYED_RESECTION_MARGINS,
            "esophagitis": Diagnosis.ESOPHAGITIS,
            "normal-cecum": Diagnosis.NORMAL_CECUM,
            "normal-pylorus": Diagnosis.NORMAL_PYLORUS,
            "normal-z-line": Diagnosis.NORMAL_Z_LINE,
            "polyps": Diagnosis.POLYPS,
            "ulcerative-colitis": Diagnosis.ULCERATIVE_COLITIS,
        },
    ),
)
"""A source of the kind `imagefolder`; one's own of this name takes its place."""
