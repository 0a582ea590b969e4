"""Fetches HAM10000 and the official ISIC 2018 Task 3 test from their public mirrors.

Nothing here starts unless it is asked for. An interrupted download resumes, files with a published
checksum are verified, and a mirror that fails gives way to the next one. Zips stay zips:
`layouts.find` reads them as they are.

The images are licensed CC BY-NC 4.0 by their authors (doi:10.7910/DVN/DBW86T).
"""

import dataclasses
import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import requests

from ham_jax import files, reading
from ham_jax.config import InputError
from ham_jax.data import layouts, records

_CHUNK_BYTES = 1 << 15  # what a break loses at the most
_TIMEOUT_S = (20, 60)  # to connect; between two packets
_PAUSE_S = 1.0  # before another attempt, doubled for each further one
_ATTEMPTS = 4  # in a row without a single new byte
_SPARE_BYTES = 64 << 20  # left free on the disk


class MirrorError(Exception):
    """This mirror cannot provide this file."""


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file of a mirror.

    Attributes:
      name: of the file on disk.
      url: where it is.
      num_bytes: its size; approximate where there is no checksum.
      checksum: 'algorithm:hexadecimal digest' where one is published.
    """

    name: str
    url: str
    num_bytes: int
    checksum: str = ""


@dataclasses.dataclass(frozen=True)
class Mirror:
    """A place that has all files of a set.

    Attributes:
      name: for messages, and of the folder for unfinished files.
      files: what makes the set.
    """

    name: str
    files: tuple[RemoteFile, ...]


_DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile/"
_ISIC = "https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task3_"

MIRRORS = {
    "train": (
        Mirror(
            "Harvard Dataverse",
            (
                RemoteFile(
                    "HAM10000_metadata.csv",
                    f"{_DATAVERSE}4338392?format=original",
                    690_218,
                    "sha256:de17ec44cb25ea9c3f6378ba18d69224c740afd62e86ec2edc6a894d6aa663d3",
                ),
                RemoteFile(
                    "HAM10000_images_part_1.zip",
                    f"{_DATAVERSE}3172585",
                    1_366_522_108,
                    "sha256:6202a599129c2efe81c25aea8586d422eeda8a4fae5df49dd7b7bbf956d419db",
                ),
                RemoteFile(
                    "HAM10000_images_part_2.zip",
                    f"{_DATAVERSE}3172584",
                    1_403_566_547,
                    "sha256:9677f30118c21ecc667a147de369d89acb25efab046fd32f6b13ad677ce2d6d0",
                ),
            ),
        ),
        Mirror(
            "ISIC challenge",
            (
                RemoteFile(
                    "ISIC2018_Task3_Training_LesionGroupings.csv",
                    f"{_ISIC}Training_LesionGroupings.csv",
                    600_000,
                ),
                RemoteFile(
                    "ISIC2018_Task3_Training_GroundTruth.zip",
                    f"{_ISIC}Training_GroundTruth.zip",
                    40_000,
                ),
                RemoteFile(
                    "ISIC2018_Task3_Training_Input.zip",
                    f"{_ISIC}Training_Input.zip",
                    2_800_000_000,
                ),
            ),
        ),
    ),
    "test": (
        Mirror(
            "Harvard Dataverse",
            (
                RemoteFile(
                    "ISIC2018_Task3_Test_GroundTruth.csv",
                    f"{_DATAVERSE}6924466?format=original",
                    110_000,
                ),
                RemoteFile("ISIC2018_Task3_Test_Images.zip", f"{_DATAVERSE}3855824", 420_000_000),
            ),
        ),
        Mirror(
            "ISIC challenge",
            (
                RemoteFile(
                    "ISIC2018_Task3_Test_GroundTruth.zip", f"{_ISIC}Test_GroundTruth.zip", 10_000
                ),
                RemoteFile("ISIC2018_Task3_Test_Input.zip", f"{_ISIC}Test_Input.zip", 420_000_000),
            ),
        ),
    ),
}
"""In the order in which they are tried."""


def download(
    folder: str | os.PathLike,
    what: str = "train",
    progress: Callable[[int, int], None] | None = None,
    mirrors: Mapping[str, Sequence[Mirror]] = MIRRORS,
) -> bool:
    """Fetches a set into a folder, unless it is there already.

    Unfinished files lie in `<folder>/.unfinished`; a set appears only when it is complete.

    Args:
      folder: where the files go.
      what: 'train' (about 2.8 GB) or 'test' (0.4 GB).
      progress: told the bytes that are there, and about how many there will be.
      mirrors: where the files are.

    Returns:
      Whether anything had to be fetched.

    Raises:
      InputError: no mirror could provide the set (with the reason of each), or the disk is full.
    """
    folder = Path(folder)
    unfinished = folder / ".unfinished"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: nothing can be written there: {error}.") from error
    reasons = []
    with files.locked(folder / ".lock"):
        if _is_complete(folder, mirrors[what]):
            shutil.rmtree(unfinished)
            return False
        for mirror in mirrors[what]:
            try:
                _fetch_all(mirror, unfinished / mirror.name, progress)
            except MirrorError as error:
                reasons.append(f"- {mirror.name}: {error}")
                continue
            except OSError as error:
                raise InputError(f"{folder}: writing failed: {error}.") from error
            for file in mirror.files:
                os.replace(unfinished / mirror.name / file.name, folder / file.name)
            shutil.rmtree(unfinished)
            return True
    by_hand = "; or ".join(" ".join(file.url for file in mirror.files) for mirror in mirrors[what])
    raise InputError(
        f"The {what} set could not be fetched into {folder}:\n"
        + "\n".join(reasons)
        + "\nRun the same command again to resume. Or fetch these files with a browser into that"
        f" folder, and leave zips as they are: {by_hand}"
    )


def _is_complete(folder: Path, mirrors: Sequence[Mirror]) -> bool:
    """Returns whether the folder holds a mirror's files, records, or the set in any layout."""
    if any(all((folder / file.name).is_file() for file in m.files) for m in mirrors):
        return True
    if records.records_folders(folder):
        return True
    try:
        layouts.find(folder)
    except InputError:
        return False
    return True


def _fetch_all(mirror: Mirror, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Fetches a mirror's files into a folder of their own, each under its name when it is whole."""
    folder.mkdir(exist_ok=True)
    there = sum(path.stat().st_size for path in folder.iterdir())
    total = sum(file.num_bytes for file in mirror.files)
    _check_disk(folder, total - there)
    before = 0
    for file in mirror.files:
        whole, part = folder / file.name, folder / f"{file.name}.part"

        def report(num_bytes: int, before: int = before) -> None:
            if progress:
                progress(before + num_bytes, max(total, before + num_bytes))

        if not whole.is_file():
            _fetch(file, part, report)
            os.replace(part, whole)
        before += whole.stat().st_size
        report(0, before)


def _fetch(file: RemoteFile, part: Path, report: Callable[[int], None]) -> None:
    """Fetches one file, going on after each break, and checks it."""
    failures = 0
    while True:
        have = _length(part)
        try:
            _receive(file, part, report)
            break
        except requests.RequestException as error:
            failures = 0 if _length(part) > have else failures + 1
            if failures >= _ATTEMPTS:
                raise MirrorError(f"{file.url}: {error}") from error
            time.sleep(_PAUSE_S * 2**failures)
    fault = _fault(file, part)
    if fault:
        part.unlink()  # the next run starts it afresh
        raise MirrorError(f"{file.url}: {fault}")


def _receive(file: RemoteFile, part: Path, report: Callable[[int], None]) -> None:
    """Appends to a part what it still lacks.

    Raises:
      requests.RequestException: the connection failed or broke; worth another attempt.
      MirrorError: the server will not give the file.
    """
    have = _length(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(file.url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        if response.status_code == 416:  # nothing comes after what is there: the checks decide
            return
        if response.status_code >= 500 or response.status_code == 429:
            raise requests.HTTPError(f"HTTP {response.status_code} {response.reason}")
        if response.status_code not in (200, 206):
            raise MirrorError(f"{file.url}: HTTP {response.status_code} {response.reason}")
        if response.status_code == 200:  # the whole file, whatever was asked for
            have = 0
        coming = int(response.headers.get("Content-Length", 0))
        _check_disk(part.parent, coming - (0 if have else _length(part)))
        with part.open("ab" if have else "wb") as sink:
            for chunk in response.iter_content(_CHUNK_BYTES):
                sink.write(chunk)
                have += len(chunk)
                report(have)


def _fault(file: RemoteFile, path: Path) -> str:
    """Returns what is wrong with a fetched file, or an empty string."""
    if file.checksum:
        algorithm, expected = file.checksum.split(":")
        with path.open("rb") as content:
            found = hashlib.file_digest(content, algorithm).hexdigest()
        if found != expected:
            return f"its {algorithm} is {found}, not {expected}"
    elif file.name.endswith(".zip"):
        try:
            reading.open_zip(path).close()
        except (OSError, zipfile.BadZipFile) as error:
            return f"the download is not a zip file: {error}"
    else:
        with path.open("rb") as content:
            if content.read(64).lstrip().startswith((b"<", b"{")):
                return "the download is a web page, not a table"
    return ""


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_disk(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE_BYTES:
        raise InputError(
            f"{folder.parent.parent} has {free / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB are"
            " still to come. Make room, or give a folder on another disk."
        )
