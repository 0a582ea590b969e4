"""What `--mode=serve` does with photographs, whoever asks: decodes, answers in turn, draws.

Photographs are decoded in processes of their own, beside each other; one that is hostile costs no
more than its own answer. The network answers one batch at a time, in a thread, and requests take
turns. Its batches have one of two sizes, both compiled at the start, so that no request waits for
a compiler.
"""

import asyncio
import base64
import contextlib
import functools
import os
import queue
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import markdown_it
import numpy as np
import pandas as pd

import ham_jax
from ham_jax import DISCLAIMER, escape
from ham_jax.data import image as image_files
from ham_jax.data import metadata
from ham_jax.inference import decision
from ham_jax.model import Answer, Ensemble, Model

MAX_PIXELS = 50_000_000
"""Of a photograph."""

MAX_WAITING = 256
"""Photographs that wait for their answers, of all requests."""

_TIME_LIMIT_S = 20  # to decode a photograph
_MAX_DECODERS = 4
_LARGEST = 32  # photographs in a batch; on CPU, where more at once are no faster, one a device
_MAX_AGE = 120  # years
_RECENT = 0.2  # weight of the last batch in the seconds that a photograph takes

Decoded = Mapping[tuple[int, int], np.ndarray | image_files.ImageError]
"""A photograph by canvas: its pixels, or why there are none."""


class FullError(Exception):
    """Too many photographs wait.

    Attributes:
      seconds: after which there should be room again.
    """

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds


class Service:
    """Answers to photographs, one batch at a time.

    Args:
      ensemble: with its decisions.
      max_waiting: see `MAX_WAITING`.

    Attributes:
      classes: those of the answers.
      takes_metadata: whether a member sees age, sex and site beside the photograph.
      about: see `describe`.
    """

    def __init__(self, ensemble: Ensemble, max_waiting: int = MAX_WAITING):
        self.classes, self._ensemble = ensemble.classes, ensemble
        self.takes_metadata, self.about = ensemble.takes_metadata, describe(ensemble)
        self._canvases = tuple(dict.fromkeys(member.canvas for member in ensemble.members))
        devices = ensemble.members[0].forward.mesh.devices
        largest = 1 if devices.flat[0].platform == "cpu" else _LARGEST
        self._few, self._many = devices.size, -(-largest // devices.size) * devices.size
        self._max_waiting, self._waiting, self._seconds_each = max_waiting, 0, 0.0
        self._network = ThreadPoolExecutor(1)
        num_decoders = max(2, min(_MAX_DECODERS, (os.cpu_count() or 1) - 1))
        self._decoding = ThreadPoolExecutor(num_decoders)
        self._idle: queue.SimpleQueue[image_files.Decoder] = queue.SimpleQueue()
        self._decoders = [
            image_files.Decoder(_TIME_LIMIT_S, MAX_PIXELS) for _ in range(num_decoders)
        ]
        for decoder in self._decoders:
            self._idle.put(decoder)

    def warm_up(self) -> None:
        """Compiles all that requests run, and starts the processes that decode."""
        starts = [self._decoding.submit(decoder.start) for decoder in self._decoders]
        self._network.submit(self._compile).result()  # in a thread, so that signals are heard
        for start in starts:
            start.result()

    def _compile(self) -> None:
        blank: Decoded = {size: np.zeros((*size, 3), np.uint8) for size in self._canvases}
        self._answer([blank] * self._many, None)
        self._answer([blank], None)
        self._heat_map(blank, 0, None)
        start = time.monotonic()
        self._answer([blank], None)
        self._seconds_each = time.monotonic() - start

    def close(self) -> None:
        """Ends the processes that decode."""
        for decoder in self._decoders:
            decoder.close()

    def queue(self) -> dict[str, Any]:
        """Returns how many photographs wait, and in about how many seconds they are answered."""
        return {"waiting": self._waiting, "seconds": self._waiting * self._seconds_each}

    async def predict(
        self,
        photographs: Sequence[bytes | image_files.ImageError],
        known: Sequence[Mapping[str, Any]] | None = None,
        explain: bool = False,
        name: str | None = None,
        is_gone: Callable[[], Awaitable[bool]] | None = None,
    ) -> list[dict[str, Any]]:
        """Returns what is said of each photograph, as JSON can hold it.

        Args:
          photographs: files, or why they are not read.
          known: age, sex and localization of each.
          explain: whether to add a heat map.
          name: of the class that it speaks for. Default: the one predicted.
          is_gone: whether nobody waits for the answers any more, asked before each batch; the rest
            is then left out.

        Raises:
          FullError: too many photographs wait already.
        """
        if self._waiting and self._waiting + len(photographs) > self._max_waiting:
            raise FullError(self.queue()["seconds"])
        self._waiting += len(photographs)
        told: list[dict[str, Any]] = []
        try:
            decoded = await asyncio.gather(*map(self._decoded, photographs))
            for rows in self._batches(len(photographs)):
                if is_gone and await is_gone():
                    break
                beside = None if known is None else known[rows]
                of_batch = await self._in_turn(decoded[rows], beside, explain, name)
                self._waiting -= len(of_batch)
                told += of_batch
            return told
        finally:
            self._waiting -= len(photographs) - len(told)

    def _batches(self, num: int) -> Iterator[slice]:
        """Yields which photographs go together: many, or where few are left, as few as can be."""
        start = 0
        while start < num:
            size = self._many if num - start > self._many // 2 else self._few
            yield slice(start, start + size)
            start += size

    async def _decoded(self, photograph: bytes | image_files.ImageError) -> Decoded:
        if isinstance(photograph, image_files.ImageError):
            return dict.fromkeys(self._canvases, photograph)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoding, self._decode, photograph)

    def _decode(self, photograph: bytes) -> Decoded:
        decoder = self._idle.get()
        decoded: dict[tuple[int, int], np.ndarray | image_files.ImageError] = {}
        try:
            for canvas in self._canvases:
                decoded[canvas] = decoder.load(photograph, canvas)
                if isinstance(error := decoded[canvas], image_files.ImageError):
                    return dict.fromkeys(self._canvases, error)
            return decoded
        finally:
            self._idle.put(decoder)

    async def _in_turn(
        self,
        decoded: Sequence[Decoded],
        known: Sequence[Mapping[str, Any]] | None,
        explain: bool,
        name: str | None,
    ) -> list[dict[str, Any]]:
        """Returns what is said of a batch."""
        loop = asyncio.get_running_loop()
        answers = await loop.run_in_executor(self._network, self._answer, decoded, known)
        told = [self._told(answer) for answer in answers]
        for number, answer in enumerate(told if explain else ()):
            answer["heat_map"] = None
            if not answer["error"]:
                label = self.classes.index(name or answer["prediction"])
                beside = known and [known[number]]
                draw = functools.partial(self._heat_map, decoded[number], label, beside)
                answer["heat_map"] = await loop.run_in_executor(self._network, draw)
        return told

    def _answer(
        self, decoded: Sequence[Decoded], known: Sequence[Mapping[str, Any]] | None
    ) -> Sequence[Answer]:
        size = self._few if len(decoded) <= self._few else self._many
        start = time.monotonic()
        answers = self._ensemble.answers(
            lambda canvas, _: (photograph[canvas] for photograph in decoded),
            len(decoded),
            known,
            size,
        )
        each = (time.monotonic() - start) / len(decoded)
        self._seconds_each += _RECENT * (each - self._seconds_each)
        return answers

    def _told(self, answer: Answer) -> dict[str, Any]:
        read = not answer.error
        return {
            "error": escape.shown(answer.error) or None,
            "prediction": answer.prediction if read else None,
            "title": self.classes.title(answer.prediction) if read else None,
            "probabilities": dict(answer.probabilities),
            "prediction_set": answer.prediction_set and list(answer.prediction_set),
            "malignancy": answer.malignancy,
            "flagged": answer.flagged,
            "ood_score": answer.ood_score,
            "unlike": answer.unlike,
        }

    def _heat_map(
        self, decoded: Decoded, label: int, known: Sequence[Mapping[str, Any]] | None
    ) -> str:
        """Returns where the first member looked, over what it saw, as the URL of a PNG."""
        model = self._ensemble.members[0]
        pixels = decoded[model.canvas]
        assert isinstance(pixels, np.ndarray)  # what cannot be read has no answer to explain
        codes = model.encode(pd.DataFrame(known or [{}]))
        view, heat = model.explain(pixels[None], np.array([label]), codes)
        png = image_files.png(_over(view[0], heat[0]))
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _over(view: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Returns a heat map over what the network saw, uint8 [s, s, 3].

    Args:
      view: float [s, s, 3] in [0, 1].
      heat: float [s, s] in [0, 1].
    """
    heat = heat[..., None]
    hot = np.clip(2 * heat - np.arange(3), 0, 1)  # black, red, yellow
    share = 0.5 * heat
    return np.round(255 * ((1 - share) * view + share * hot)).astype(np.uint8)


def describe(ensemble: Ensemble) -> dict[str, Any]:
    """Returns what a page needs to know of a model, as JSON can hold it."""
    members, classes = ensemble.members, ensemble.classes
    names = [Path(member.name).resolve().name for member in members]
    takes = ensemble.takes_metadata
    return {
        "name": " + ".join(names),
        "classes": [
            {"name": name, "title": classes.title(name), "malignant": name in classes.malignant}
            for name in classes
        ],
        "takes_metadata": takes,
        "metadata": {"sex": [*metadata.SEXES], "localization": [*metadata.SITES]}
        if takes
        else None,
        "level": decision.LEVEL,
        "has_calibration": all(member.calibrator for member in members),
        "has_ood": any(member.detector for member in members),
        "heat_map_of": names[0] if len(names) > 1 else None,
        "accept": ",".join(["image/*", *sorted(image_files.SUFFIXES)]),
        "card_html": _card(members) or None,
        "disclaimer": DISCLAIMER,
        "version": ham_jax.__version__,
        "sets_note": _sets_note(members) or None,
    }


def _sets_note(members: Sequence[Model]) -> str:
    """Returns `decision.sets_note`; of several members, whose sets nobody measured, ''."""
    if len(members) > 1 or (calibrator := members[0].calibrator) is None:
        return ""
    choice = calibrator.choice(members[0].config.eval.calibration)
    return decision.sets_note(choice, members[0].classes)


def _card(members: Sequence[Model]) -> str:
    """Returns the cards as HTML; of what may come from anywhere, without HTML of its own."""
    markdown = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.disable("image")
    cards = []
    for member in members:
        with contextlib.suppress(FileNotFoundError):
            text = re.sub(r"\A---\n.*?\n---\n", "", member.card, flags=re.DOTALL)
            cards.append(markdown.render(text))
    return "<hr>".join(cards)


def metadata_faults(known: Any, num_photographs: int) -> list[str]:
    """Returns a sentence for each reason why this is not what `predict` takes as `known`."""
    if not isinstance(known, list) or not all(isinstance(one, dict) for one in known):
        return ["metadata must be a JSON list of objects, one a photograph."]
    if len(known) != num_photographs:
        return [f"There are metadata of {len(known)} for {num_photographs} photographs."]
    faults = []
    for number, one in enumerate(known, 1):
        if others := sorted(one.keys() - metadata.COLUMNS.keys()):
            faults.append(
                f"Photograph {number}: {escape.shown(others[0])!r:.60} is not one of"
                f" {', '.join(metadata.COLUMNS)}."
            )
        age = one.get("age")
        number_given = isinstance(age, int | float) and not isinstance(age, bool)
        if age is not None and not (number_given and 0 <= age <= _MAX_AGE):
            faults.append(
                f"Photograph {number}: age must be a number of years from 0 to {_MAX_AGE}, or null."
            )
        for column, words in (("sex", metadata.SEXES), ("localization", metadata.SITES)):
            if one.get(column) not in (None, *metadata.UNKNOWN, *words):
                faults.append(
                    f"Photograph {number}: {column} must be one of {', '.join(words)}, or null."
                )
    return faults
