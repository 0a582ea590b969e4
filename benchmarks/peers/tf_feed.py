"""The other side of `python benchmarks/speed.py feed`: plain tf.data over the photographs.

Decodes each JPEG file anew, with a random resized crop and flips. Prints JSON when it is warm; for
each line with a number of images it loads at least as many and prints [images, seconds].
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf


def main() -> None:
    """Warms up and obeys."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--px", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    flags = parser.parse_args()
    tf.config.set_visible_devices([], "GPU")

    def read(path: tf.Tensor) -> tf.Tensor:
        image = tf.image.decode_jpeg(tf.io.read_file(path), channels=3)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros([0, 0, 4]),
            area_range=(0.4, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.image.resize(tf.slice(image, begin, size), (flags.px, flags.px)) / 255
        return tf.image.random_flip_up_down(tf.image.random_flip_left_right(image))

    paths = [str(path) for path in sorted(flags.images.rglob("*.jpg"))]
    dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    dataset = dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE).batch(flags.batch)
    batches = dataset.prefetch(2).as_numpy_iterator()
    next(batches)
    print(json.dumps({"versions": {"tensorflow": tf.__version__}}), flush=True)
    for line in sys.stdin:
        # What was loaded ahead while this process had to wait is not part of the measurement.
        for _ in range(4):
            next(batches)
        start, done = time.perf_counter(), 0
        while done < int(line):
            done += len(next(batches))
        print(json.dumps([done, time.perf_counter() - start]), flush=True)


if __name__ == "__main__":
    main()
