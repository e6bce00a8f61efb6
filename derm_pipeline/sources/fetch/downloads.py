"""Where each dataset is to be had: the publishers' own addresses, or how to apply for it.

Addresses were taken from the publishers' pages and from public code that uses them; none could be tried where this was
written, which has no internet. Sizes are as the publishers state them; what counts is what the server announces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from derm_pipeline.sources.fetch.archives import in_words


@dataclass(frozen=True)
class RemoteFile:
    """One file at a fixed address."""

    url: str
    name: str
    """Path in the source's folder, with forward slashes."""
    size_bytes: int | None = None
    """About how large it is, as published; None if that is not said."""
    checksum: str | None = None
    """The publisher's own, as `md5:...` or `sha256:...`."""


@dataclass(frozen=True)
class Dataverse:
    """Files of a dataset in a Dataverse repository, found by their names in its listing, each with its checksum."""

    server: str
    doi: str
    names: Mapping[str, str]
    """Name in the dataset, without suffix -> path in the source's folder."""


@dataclass(frozen=True)
class ListedImages:
    """Images that a downloaded table names by their paths below one address."""

    table: str
    """The table's path in the source's folder."""
    columns: tuple[str, ...]
    base_url: str
    path_pattern: str
    """What a path in the table looks like; its group `name` is the path in the source's folder. Others are refused."""
    about_bytes: int
    """About how large all of them are."""


@dataclass(frozen=True)
class Direct:
    """A dataset, or a part of it, that anybody may download who accepts its licence."""

    title: str
    homepage: str
    files: tuple[RemoteFile, ...] = ()
    dataverse: Dataverse | None = None
    images: ListedImages | None = None
    about_bytes: int | None = None
    """About how large everything is, as published."""
    missing: str = ""
    """What must be got by other means, and how; empty if nothing."""


@dataclass(frozen=True)
class Application:
    """A dataset that its publisher gives to those who ask, or by a page that has to be visited."""

    title: str
    homepage: str
    steps: tuple[str, ...]
    """What to do, in order."""


Download = Direct | Application

_ISIC = "https://isic-challenge-data.s3.amazonaws.com"
_SCIN = "https://storage.googleapis.com/dx-scin-public-data/"
_FITZPATRICK_IMAGES = (
    "The images are not published in one place. Get them from the hosts in the table's `url` column, or ask the "
    "authors by the form that https://github.com/mattgroh/fitzpatrick17k links to, and put them into images/ as "
    "<md5hash>.jpg."
)

DOWNLOADS: dict[str, Download] = {
    "ham10000": Direct(
        title="HAM10000",
        homepage="https://doi.org/10.7910/DVN/DBW86T",
        # Files are found by name in the listing, since the table has changed its number there with every correction.
        dataverse=Dataverse(
            server="https://dataverse.harvard.edu",
            doi="doi:10.7910/DVN/DBW86T",
            names={
                "HAM10000_metadata": "HAM10000_metadata.csv",
                "HAM10000_images_part_1": "HAM10000_images_part_1.zip",
                "HAM10000_images_part_2": "HAM10000_images_part_2.zip",
                "HAM10000_segmentations_lesion_tschandl": "HAM10000_segmentations_lesion_tschandl.zip",
            },
        ),
        about_bytes=2_800_000_000,
    ),
    "isic2018_test": Direct(
        title="ISIC 2018 Task 3 test set",
        homepage="https://challenge.isic-archive.com/data/#2018",
        files=(
            RemoteFile(f"{_ISIC}/2018/ISIC2018_Task3_Test_GroundTruth.zip", "ISIC2018_Task3_Test_GroundTruth.zip"),
            RemoteFile(f"{_ISIC}/2019/ISIC_2019_Test_Metadata.csv", "ISIC_2019_Test_Metadata.csv"),
            RemoteFile(f"{_ISIC}/2018/ISIC2018_Task3_Test_Input.zip", "ISIC2018_Task3_Test_Input.zip", 402_000_000),
        ),
        about_bytes=405_000_000,
    ),
    "isic2019": Direct(
        title="ISIC 2019 training set",
        homepage="https://challenge.isic-archive.com/data/#2019",
        files=(
            RemoteFile(f"{_ISIC}/2019/ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_GroundTruth.csv"),
            RemoteFile(f"{_ISIC}/2019/ISIC_2019_Training_Metadata.csv", "ISIC_2019_Training_Metadata.csv"),
            RemoteFile(f"{_ISIC}/2019/ISIC_2019_Training_Input.zip", "ISIC_2019_Training_Input.zip", 9_100_000_000),
        ),
        about_bytes=9_100_000_000,
    ),
    "isic2020": Direct(
        title="ISIC 2020 training set",
        homepage="https://doi.org/10.34970/2020-ds01",
        files=(
            RemoteFile(f"{_ISIC}/2020/ISIC_2020_Training_GroundTruth_v2.csv", "ISIC_2020_Training_GroundTruth_v2.csv"),
            RemoteFile(f"{_ISIC}/2020/ISIC_2020_Training_Duplicates.csv", "ISIC_2020_Training_Duplicates.csv"),
            RemoteFile(f"{_ISIC}/2020/ISIC_2020_Training_JPEG.zip", "ISIC_2020_Training_JPEG.zip", 23_000_000_000),
        ),
        about_bytes=23_000_000_000,
    ),
    "fitzpatrick17k": Direct(
        title="Fitzpatrick17k",
        homepage="https://github.com/mattgroh/fitzpatrick17k",
        files=(
            RemoteFile(
                "https://raw.githubusercontent.com/mattgroh/fitzpatrick17k/main/fitzpatrick17k.csv",
                "fitzpatrick17k.csv",
            ),
        ),
        about_bytes=4_000_000,
        missing=_FITZPATRICK_IMAGES,
    ),
    "fitz_subset": Direct(
        title="Fitz_subset (From Majority to Minority)",
        homepage="https://github.com/janet-sw/skin-diff",
        files=(  # at the commit that added it: the file itself, whatever becomes of the repository's branch
            RemoteFile(
                "https://raw.githubusercontent.com/janet-sw/skin-diff/ae5a97219bffdc4fb71d6f74d75c806a1b6344a7/"
                "data_splits/Fitz_subset.csv",
                "Fitz_subset.csv",
                663_334,
            ),
        ),
        about_bytes=663_334,
        missing=f"Its images are those of Fitzpatrick17k. {_FITZPATRICK_IMAGES}",
    ),
    "scin": Direct(
        title="SCIN",
        homepage="https://github.com/google-research-datasets/scin",
        files=(
            RemoteFile(f"{_SCIN}dataset/scin_cases.csv", "scin_cases.csv"),
            RemoteFile(f"{_SCIN}dataset/scin_labels.csv", "scin_labels.csv"),
        ),
        images=ListedImages(
            table="scin_cases.csv",
            columns=("image_1_path", "image_2_path", "image_3_path"),
            base_url=_SCIN,
            path_pattern=r"dataset/(?P<name>images/-?\d{1,30}\.(png|jpg|jpeg))",
            about_bytes=12_000_000_000,
        ),
        about_bytes=12_000_000_000,
    ),
    "pad_ufes20": Application(
        title="PAD-UFES-20",
        homepage="https://data.mendeley.com/datasets/zr7vgbcyr2/1",
        steps=(
            "Open the page and press Download All (about 3.4 GB); no application is needed.",
            "Unpack that archive, and put its metadata.csv and its folder images/ (with imgs_part_1.zip to "
            "imgs_part_3.zip) into the source's folder. The inner archives are unpacked when the source is first used.",
        ),
    ),
    "kvasir": Application(
        title="Kvasir",
        homepage="https://datasets.simula.no/kvasir",
        steps=(
            "Download kvasir-dataset-v2.zip (8,000 images, about 2.3 GB) from the page; no application is needed.",
            "Unpack it, and put its eight folders (dyed-lifted-polyps and so on) into the source's folder.",
        ),
    ),
    "d7p": Application(
        title="derm7pt (D7P)",
        homepage="https://derm.cs.sfu.ca/Download.html",
        steps=(
            "Ask for an account on the page, and accept its terms (research use).",
            "Download release_v0.zip.",
            "Unpack it, and put its folders meta/ and images/ (or release_v0/ as it is) into the source's folder.",
        ),
    ),
    "ddi": Application(
        title="Diverse Dermatology Images (DDI)",
        homepage="https://ddi-dataset.github.io/#access",
        steps=(
            "Follow the page to Stanford AIMI's shared datasets, register, and accept the research use agreement.",
            "Download the dataset (656 images and ddi_metadata.csv).",
            "Put ddi_metadata.csv and the images (000001.png ...), beside it or in images/, into the source's folder.",
        ),
    ),
}
"""By source. A source that is not here is the user's own, or drawn."""


def how_to_get(name: str) -> str:
    """The page for people: what is downloaded, from where and how large; or where to apply, and what then.

    Args:
        name: a source's name; the folder meant is the source's own.
    """
    download = DOWNLOADS.get(name)
    if download is None:
        return f"{name} is not downloaded: its files are your own, or drawn on this machine.\n"
    if isinstance(download, Application):
        steps = [f"  {number}. {step}" for number, step in enumerate(download.steps, 1)]
        return "\n".join([f"{download.title} is given out by its publisher: {download.homepage}", *steps]) + "\n"
    lines = [f"{download.title}: `derm fetch {name} --accept-licence` downloads, from {download.homepage}"]
    lines += [f"  {remote.name}{_size(remote.size_bytes)} from {remote.url}" for remote in download.files]
    if download.dataverse is not None:
        where = f"{download.dataverse.server} ({download.dataverse.doi})"
        lines += [f"  {path} from {where}" for path in download.dataverse.names.values()]
    if download.images is not None:
        images = download.images
        lines.append(f"  the images that {images.table} lists{_size(images.about_bytes)} from {images.base_url}")
    if download.about_bytes is not None:
        again = "; zip archives take as much again when unpacked" if any(".zip" in line for line in lines) else ""
        lines.append(f"  In all about {in_words(download.about_bytes)}{again}.")
    if download.missing:
        lines.append(f"  {download.missing}")
    return "\n".join(lines) + "\n"


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f" (about {in_words(num_bytes)})"
