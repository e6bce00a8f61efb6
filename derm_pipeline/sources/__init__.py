"""The datasets: one adapter each, and what they share."""

from derm_pipeline.sources.base import Scan, Source, scan
from derm_pipeline.sources.d7p import D7p
from derm_pipeline.sources.ddi import Ddi
from derm_pipeline.sources.fitzpatrick17k import Fitzpatrick17k, FitzSubset
from derm_pipeline.sources.ham10000 import Ham10000
from derm_pipeline.sources.isic import Isic2018Test, Isic2019, Isic2020
from derm_pipeline.sources.kvasir import KVASIR
from derm_pipeline.sources.pad_ufes20 import PadUfes20
from derm_pipeline.sources.phantom import PhantomSource
from derm_pipeline.sources.scin import Scin

SOURCES: dict[str, Source] = {
    "phantom": PhantomSource(),
    "ham10000": Ham10000(),
    "isic2018_test": Isic2018Test(),
    "isic2019": Isic2019(),
    "isic2020": Isic2020(),
    "d7p": D7p(),
    "scin": Scin(),
    "fitzpatrick17k": Fitzpatrick17k(),
    "fitz_subset": FitzSubset(),
    "ddi": Ddi(),
    "pad_ufes20": PadUfes20(),
    "kvasir": KVASIR,
}
"""Every shipped source by its name; the user's own come from `sources.yaml` in the data folder (see `own`)."""

__all__ = ["SOURCES", "Scan", "Source", "scan"]
