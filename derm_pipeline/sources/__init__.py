"""The datasets: one adapter each, and what they share."""

from derm_pipeline.sources.base import Scan, Source, scan
from derm_pipeline.sources.ham10000 import Ham10000
from derm_pipeline.sources.phantom import PhantomSource

SOURCES: dict[str, Source] = {
    "ham10000": Ham10000(),
    "phantom": PhantomSource(),
}
"""Every source by its name."""

__all__ = ["SOURCES", "Scan", "Source", "scan"]
