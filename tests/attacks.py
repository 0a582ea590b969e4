"""What the tests of hostile files make, and how they measure."""

import tracemalloc
import zipfile
import zlib

GIGABYTES = 3 << 30


def zeros(num_bytes):
    """Returns whole mebibytes of zeros as deflate packs them, without packing them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (num_bytes >> 20) + packer.flush()


def zip_of(path, members):
    """Writes a zip that says of its members what it is told: {name: (packed, size)}."""
    with zipfile.ZipFile(path, "w") as file:
        for name, (packed, size) in members.items():
            file.writestr(name, packed)
            if size is not None:
                file.filelist[-1].compress_type = zipfile.ZIP_DEFLATED
                file.filelist[-1].file_size = size
    return path


class Cheap:
    """Holds a block to little memory."""

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, *_):
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200 << 20
