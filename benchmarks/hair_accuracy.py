"""How well hair is found: on phantoms at three sizes, and on real images that were labelled by eye.

Prints one JSON object: for each size the area under the ROC curve of the score, the share of images flagged with hair,
without, and with only a ruler, the mask's Dice and the time; how the flag changes with the size over the same cases;
with `--labels CSV --images DIR` (columns image_id, hair) the same for real images. Every figure carries its n.

    python benchmarks/hair_accuracy.py [--images-per-size 400 200 80] [--method canny_004]
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from derm_pipeline.hair import Hair, HairConfig, detect_hair
from derm_pipeline.images import Pixels, read_image
from derm_pipeline.sources.phantom.drawing import Phantom, PhantomConfig, draw, plan

_EQUAL = dict.fromkeys(("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"), 1.0)
_MIXED = {"p_hair": 0.5, "p_ruler": 0.3, "p_ink": 0.2, "p_bubbles": 0.3, "p_vignette": 0.4}
_RULER = {"p_hair": 0.0, "p_ruler": 1.0, "p_ink": 0.0, "p_bubbles": 0.0, "p_vignette": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-size", type=int, nargs=3, default=(400, 200, 80), help="at 200, 450, 1200 px")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--method", choices=("oriented", "canny_004"), default="oriented")
    parser.add_argument("--labels", type=Path, help="CSV with the columns image_id and hair (0 or 1)")
    parser.add_argument("--images", type=Path, help="folder that holds the labelled images, searched in depth")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    config = HairConfig(method=options.method)
    report: dict[str, object] = {"method": config.method, "hairy_score": config.hairy_score, **_machine()}
    per_size: dict[str, object] = {}
    flags: list[np.ndarray] = []
    for width, count in zip((200, 450, 1200), options.images_per_size, strict=True):
        per_size[str(width)], flagged = _phantoms(width, count, options.seed, config)
        flags.append(flagged)
    report["phantoms"] = per_size
    report["same_cases"] = _drift(flags)
    if options.labels is not None:
        if options.images is None:
            parser.error("--labels needs --images")
        report["labelled"] = _labelled(options.labels, options.images, config)
    print(json.dumps(report, indent=2))


def _machine() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"python": platform.python_version(), "cv2": cv2.__version__, "cpu": platform.processor(), "commit": commit}


def _draw(width: int, count: int, seed: int, chances: dict[str, float]) -> Iterator[Phantom]:
    for case in plan(PhantomConfig(num_images=count, seed=seed, **_EQUAL, **chances)):
        yield draw(case, width, width * 3 // 4)


def _phantoms(width: int, count: int, seed: int, config: HairConfig) -> tuple[dict[str, object], np.ndarray]:
    scores, flags, truth, dice, spent_s = [], [], [], [], 0.0
    for phantom in _draw(width, count, seed, _MIXED):
        hair, seconds = _timed(phantom.image, config)
        spent_s += seconds
        scores.append(hair.score)
        flags.append(hair.is_hairy)
        truth.append("hair" in phantom.artefacts)
        if truth[-1]:
            dice.append(_dice(hair.mask, phantom.hair_mask))
    rulers = [_timed(phantom.image, config)[0].is_hairy for phantom in _draw(width, count // 2, seed + 1, _RULER)]
    summary = _summary(np.array(scores), np.array(flags), np.array(truth))
    summary |= {
        "ruler_only": {"n": len(rulers), "flagged": round(float(np.mean(rulers)), 4)},
        "dice": {"n": len(dice), "mean": round(float(np.mean(dice)), 4)},
        "ms_per_image": round(1000 * spent_s / count, 2),
    }
    return summary, np.array(flags)


def _drift(flags: list[np.ndarray]) -> dict[str, object]:
    """Over the cases drawn at every size: the share flagged at each, and the share whose flag changes."""
    same = np.stack([flagged[: min(map(len, flags))] for flagged in flags])
    differ = (same != same[:1]).any(axis=0).mean()
    return {"n": same.shape[1], "flagged": same.mean(axis=1).round(4).tolist(), "differ": round(float(differ), 4)}


def _labelled(labels: Path, folder: Path, config: HairConfig) -> dict[str, object]:
    with labels.open(newline="") as file:
        truth = {row["image_id"]: row["hair"] == "1" for row in csv.DictReader(file)}
    paths = {path.stem: path for path in folder.rglob("*") if path.stem in truth}
    if missing := sorted(set(truth) - set(paths)):
        raise FileNotFoundError(f"no image in {folder} for {len(missing)} labels, the first is {missing[0]}")
    found = [detect_hair(read_image(paths[image_id]), config) for image_id in truth]
    scores, flags = np.array([hair.score for hair in found]), np.array([hair.is_hairy for hair in found])
    return _summary(scores, flags, np.array(list(truth.values())))


def _timed(image: Pixels, config: HairConfig) -> tuple[Hair, float]:
    start = time.process_time()
    hair = detect_hair(image, config)
    return hair, time.process_time() - start


def _dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * float((found & truth).sum()) / max(1, int(found.sum() + truth.sum()))


def _summary(scores: np.ndarray, flags: np.ndarray, truth: np.ndarray) -> dict[str, object]:
    above = (scores[truth][:, None] > scores[~truth]).mean() + 0.5 * (scores[truth][:, None] == scores[~truth]).mean()
    return {
        "auroc": round(float(above), 4),
        "hair": {"n": int(truth.sum()), "flagged": round(float(flags[truth].mean()), 4)},
        "no_hair": {"n": int((~truth).sum()), "flagged": round(float(flags[~truth].mean()), 4)},
    }


if __name__ == "__main__":
    main()
