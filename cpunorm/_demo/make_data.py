"""Make `data/images.npz`, the images the main job runs on. Needs scikit-learn and pillow.

Run ``python -m cpunorm._demo.make_data`` in a checkout; `data/LICENSES.md` says whose images
they are.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

PHOTO_SIZE = (112, 168)  # a quarter of the originals, and two by three tiles of 56 x 56
DIGITS = 512


def main() -> None:
    """Write the file, and print how large it is."""
    height, width = PHOTO_SIZE
    photos = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
        for image in load_sample_images().images
    ]
    digits = load_digits()
    target = Path(__file__).parent / "data" / "images.npz"
    np.savez_compressed(
        target,
        photos=np.stack(photos),
        digits=digits.images[:DIGITS].astype(np.uint8),
        labels=digits.target[:DIGITS].astype(np.uint8),
    )
    print(f"{target}: {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
