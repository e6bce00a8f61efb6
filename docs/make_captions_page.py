"""Make a page of real images with the embedded captioner's words under each, to be judged by eye.

python docs/make_captions_page.py data/raw/ham10000 captions.png

24 images, as even over the diagnoses as can be, always the same: those whose id has the smallest SHA-256. The images
stay under their dataset's licence; do not publish the page where that forbids it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from derm_pipeline.captions.descriptors import measure
from derm_pipeline.captions.segmentation import see
from derm_pipeline.captions.visual import sentence
from derm_pipeline.hair import detect_hair
from derm_pipeline.images import Pixels, contact_sheet, encode_png, read_image
from derm_pipeline.sources import SOURCES
from derm_pipeline.sources.listing import Candidate

_LONG_SIDE_PX = 600
_TILE_PX, _TITLE_PX, _LINE_PX = 400, 20, 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the source's raw folder")
    parser.add_argument("page", type=Path, help="PNG to write")
    parser.add_argument("--source", choices=sorted(SOURCES), default="ham10000")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--skip", type=int, default=0, help="leave out this many images first: another page")
    parser.add_argument("--outlined", action="store_true", help="draw the outline of the lesion that was found")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    listed = SOURCES[options.source].list_images(options.folder).candidates
    chosen = choose(listed, options.skip + options.count)[options.skip :]
    tiles = []
    for one in chosen:
        image = read_image(options.folder / str(one.file), reduce_to_px=_LONG_SIDE_PX)
        picture, text = caption(image, outlined=options.outlined)
        tiles.append(tile(picture, f"{one.image_id}  {one.diagnosis or one.source_label}", text))
    options.page.write_bytes(encode_png(contact_sheet(np.stack(tiles), columns=4)))
    sys.stdout.write(f"{options.page}\n")


def choose(listed: Sequence[Candidate], count: int) -> list[Candidate]:
    """`count` images with a file, one diagnosis after the other in turn, each in the order of their ids' digests."""
    by_diagnosis: dict[str, list[Candidate]] = defaultdict(list)
    for one in sorted(listed, key=lambda one: hashlib.sha256(one.image_id.encode()).hexdigest()):
        if one.file is not None:
            by_diagnosis[one.diagnosis or one.source_label].append(one)
    turns = [(place, name, one) for name, of_one in by_diagnosis.items() for place, one in enumerate(of_one)]
    return [one for _, _, one in sorted(turns, key=lambda turn: turn[:2])][:count]


def caption(image: Pixels, *, outlined: bool) -> tuple[Pixels, str]:
    """The picture, with the outline of the lesion that was found if `outlined`, and the embedded captioner's words.

    It is given the image's hair, as the pipeline gives it.
    """
    hair = detect_hair(image)
    scene = see(image, hair.mask)
    text = sentence(measure(scene), hair.is_hairy)
    height_px = round(_TILE_PX * image.shape[0] / image.shape[1])
    shown = cv2.resize(image, (_TILE_PX, height_px), interpolation=cv2.INTER_AREA)
    if outlined:
        lesion = cv2.resize(scene.lesion.astype(np.uint8), shown.shape[1::-1])
        outline, _ = cv2.findContours(lesion, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, outline, -1, (0, 255, 0), 1)
    return np.asarray(shown, np.uint8), text


def tile(picture: Pixels, title: str, text: str) -> Pixels:
    """The picture between a line of title and its caption, on white."""
    words = textwrap.wrap(text, 50)
    sheet = np.full((_TITLE_PX + _TILE_PX * 3 // 4 + 6 * _LINE_PX, _TILE_PX + 16, 3), 255, np.uint8)
    top = sheet[_TITLE_PX : _TITLE_PX + _TILE_PX * 3 // 4, 8:-8]
    top[: picture.shape[0]] = picture[: top.shape[0]]
    lines = [(title, _TITLE_PX - 6)]
    lines += [(line, _TITLE_PX + _TILE_PX * 3 // 4 + _LINE_PX * (number + 1) - 2) for number, line in enumerate(words)]
    for line, y in lines:
        cv2.putText(sheet, line, (8, y), cv2.FONT_HERSHEY_SIMPLEX, 0.43, (0, 0, 0), 1, cv2.LINE_AA)
    return sheet


if __name__ == "__main__":
    main()
