"""python onnx_predict.py model.onnx PHOTOGRAPH ...: needs onnxruntime, pillow and numpy alone.

Educational and research use; not a medical device.

The canvas: the photograph upright and in RGB, turned a quarter where it is a portrait and the
canvas is not; its largest centred part of the canvas's proportions, scaled with Pillow's bicubic
filter. ham_jax also turns embedded colour profiles into sRGB, and decodes a JPEG of several times
the canvas's size smaller, which changes no pixel by more than about a grey level.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def on_canvas(photograph, height, width):
    """Returns uint8 [height, width, 3]."""
    image = ImageOps.exif_transpose(Image.open(photograph)).convert("RGB")
    if (image.height - image.width) * (height - width) < 0:
        image = image.transpose(Image.Transpose.ROTATE_90)
    scale = max(height / image.height, width / image.width)
    part = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - part[0]) / 2, (image.height - part[1]) / 2
    box = (left, top, left + part[0], top + part[1])
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def answers(model, photographs):
    """Yields a dict a photograph."""
    session = onnxruntime.InferenceSession(model)
    said = session.get_modelmeta().custom_metadata_map
    classes, malignant, canvas = (json.loads(said[n]) for n in ("classes", "malignant", "canvas"))
    thresholds = json.loads(said.get("thresholds", "{}"))
    for photograph in photographs:
        inputs = {"image": on_canvas(photograph, *canvas)[None]}
        if "metadata" in said:  # age, sex and site are unknown
            inputs["metadata"] = np.array([json.loads(said["metadata"])["missing"]], np.float32)
        names = [output.name for output in session.get_outputs()]
        out = dict(zip(names, session.run(names, inputs), strict=True))
        p = dict(zip(classes, out["probabilities"][0].tolist(), strict=True))
        answer = {"prediction": max(p, key=p.get), "probabilities": p}
        if thresholds:
            least = dict(zip(classes, thresholds["shown"], strict=True))
            answer["prediction_set"] = [name for name in classes if p[name] >= least[name]]
            at_risk = sum(p[name] for name in malignant)
            answer["flagged"] = bool(malignant) and at_risk >= thresholds["malignant"]
        if "ood_score" in out:
            answer["unlike"] = bool(out["ood_score"][0] > 1)
        yield {"photograph": str(photograph), **answer}


if __name__ == "__main__":
    for answer in answers(sys.argv[1], sys.argv[2:]):
        print(json.dumps(answer))
