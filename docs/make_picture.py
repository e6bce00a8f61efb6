"""Make docs/RECIPE.jpg, a picture of a finished recipe: real images left, samples right, light to dark skin.

python docs/make_picture.py [RECIPE]      (in the project's folder, after `derm run RECIPE`)
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from derm_pipeline.defs.resources import default_workspace
from derm_pipeline.defs.stages.evaluation import sample_images
from derm_pipeline.defs.stages.reports import comparison
from derm_pipeline.defs.stages.sets import TRAINING_SET
from derm_pipeline.images import contact_sheet, encode_jpeg


def main(recipe: str = "quickstart") -> None:
    workspace = default_workspace()
    train = workspace.store.current("training_set", recipe).table(TRAINING_SET)
    metadata, samples = sample_images(workspace.store.current("synthetic_dataset", recipe))
    rows = comparison(workspace, workspace.recipe(recipe), train, metadata, samples, count=7)
    gap = np.full_like(rows[0].real[:1], 255)
    tiles = np.concatenate([np.concatenate([row.real, gap, row.samples]) for row in rows])
    sheet = contact_sheet(tiles, columns=2 * len(rows[0].real) + 1)
    large = cv2.resize(sheet, None, fx=1.5, fy=1.5, interpolation=cv2.INTER_CUBIC)
    path = Path(__file__).with_name(f"{recipe}.jpg")
    path.write_bytes(encode_jpeg(np.asarray(large, np.uint8), quality=88))
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
