"""Small raw folders in the published layouts, for the tests of layouts and records."""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ham_jax.data import layouts

# Two images of one lesion, and one lesion of each other class but df.
ROWS = pd.DataFrame(
    [
        ("HAM_0000001", "ISIC_0024310", "mel", "histo", "45.0", "female", "back"),
        ("HAM_0000001", "ISIC_0024306", "mel", "histo", "45.0", "female", "back"),
        ("HAM_0000002", "ISIC_0024307", "nv", "follow_up", "", "unknown", "unknown"),
        ("HAM_0000003", "ISIC_0024308", "akiec", "histo", "0.0", "male", "face"),
        ("HAM_0000004", "ISIC_0024309", "vasc", "consensus", "70.0", "male", "hand"),
        ("HAM_0000005", "ISIC_0024311", "bkl", "confocal", "55.0", "male", "trunk"),
        ("HAM_0000006", "ISIC_0024312", "bcc", "histo", "85.0", "female", "scalp"),
    ],
    columns=["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"],
)
IDS = sorted(ROWS["image_id"])


def jpeg(name: str) -> bytes:
    """A picture of its own for every name."""
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48))
    buffer = io.BytesIO()
    pixels.save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def kaggle(folder: Path, rows: pd.DataFrame = ROWS) -> Path:
    for k, part in enumerate(("HAM10000_images_part_1", "ham10000_images_part_1")):
        (folder / part).mkdir(parents=True)
        for name in IDS if k else IDS[:3]:
            (folder / part / f"{name}.jpg").write_bytes(jpeg(name))
    rows.to_csv(folder / "HAM10000_metadata.csv", index=False)
    (folder / "hmnist_8_8_L.csv").write_text("pixel0000,pixel0001,label\n1,2,3\n")
    (folder / "my_split.csv").write_text("image_id,split\nISIC_0024306,train\n")
    return folder


def dataverse(folder: Path) -> Path:
    folder.mkdir()
    for part, names in (("HAM10000_images_part_1", IDS[:4]), ("HAM10000_images_part_2", IDS[4:])):
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as file:
            for name in names:
                file.writestr(f"{part}/{name}.jpg", jpeg(name))
                file.writestr(f"__MACOSX/{part}/._{name}.jpg", b"junk")
                file.writestr(f"{part}/._{name}.jpg", b"junk")
    with zipfile.ZipFile(folder / "HAM10000_segmentations_lesion_tschandl.zip", "w") as file:
        file.writestr(f"masks/{IDS[0]}_segmentation.png", b"mask")
    ROWS.assign(dataset="rosendahl").to_csv(
        folder / "HAM10000_metadata.tab", index=False, sep="\t", quoting=1
    )
    return folder


def one_hot(rows: pd.DataFrame) -> str:
    order = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")
    lines = [
        f"{r.image_id}," + ",".join(f"{r.dx == c:.1f}" for c in order) for r in rows.itertuples()
    ]
    return "\n".join([",".join(["image", *map(str.upper, order)]), *lines]) + "\n"


def isic(folder: Path) -> Path:
    inputs = folder / "ISIC2018_Task3_Training_Input"
    inputs.mkdir(parents=True)
    for name in IDS:
        (inputs / f"{name}.JPG").write_bytes(jpeg(name))
        (inputs / f"{name}_superpixels.png").write_bytes(b"junk")
    (inputs / "ATTRIBUTION.txt").write_text("image by somebody")
    with zipfile.ZipFile(folder / "ISIC2018_Task3_Training_GroundTruth.zip", "w") as file:
        name = "ISIC2018_Task3_Training_GroundTruth"
        file.writestr(f"{name}/{name}.csv", one_hot(ROWS))
    confirmed = {v: k for k, v in layouts._CONFIRMED.items()}
    ROWS.assign(
        image=ROWS["image_id"], diagnosis_confirm_type=ROWS["dx_type"].map(confirmed)
    ).to_csv(
        folder / "ISIC2018_Task3_Training_LesionGroupings.csv",
        columns=["image", "lesion_id", "diagnosis_confirm_type"],
        index=False,
    )
    return folder


def flat(folder: Path) -> Path:
    folder.mkdir()
    for name in IDS:
        (folder / f"{name}.jpg").write_bytes(jpeg(name))
    text = ROWS.to_csv(index=False).replace("\n", "\r\n\r\n")  # blank lines, Windows line ends
    (folder / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return folder
