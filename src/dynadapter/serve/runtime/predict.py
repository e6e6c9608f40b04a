"""Classify images with the exported folder that holds this file: ``python exported/predict.py photos``.

Numpy, Pillow, and onnxruntime or openvino suffice; neither torch nor dynadapter needs to be installed.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from dynadapter.files import shown
from dynadapter.serve.formats import COLUMNS, write_table
from dynadapter.serve.runtime.runner import Runner, list_sources
from dynadapter.serve.runtime.sessions import ENGINES


def main(args: Sequence[str] | None = None, folder: Path = Path(__file__).parent) -> int:
    """Print one CSV row an image: file, class, confidence in [0, 1], exit from 1."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a batch (default: 32)")
    parser.add_argument("--threads", type=int, help="threads of an operator (default: one on each core)")
    parser.add_argument("--engine", choices=list(ENGINES), default="onnxruntime", help="what runs the graphs")
    parser.add_argument("--provider", action="append", help="execution provider of ONNX Runtime (default: the CPU)")
    parser.add_argument(
        "--on_error", choices=("raise", "skip"), default="raise", help="what to do for an unreadable image"
    )
    words = "values that become 0 and 255 in images of more than 8 bits (default: as in training)"
    parser.add_argument("--value_range", nargs=2, type=float, metavar=("LOW", "HIGH"), help=words)
    given = parser.parse_args(args)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {shown(message)}", file=sys.stderr)
            runner = Runner(folder, given.provider, given.threads, given.engine)
            if given.value_range:
                preprocess = replace(runner.manifest.preprocess, value_range=given.value_range)
                runner.manifest = replace(runner.manifest, preprocess=preprocess)
            rows = predict(runner, given.images, given.batch_size, given.on_error)
            with open(sys.stdout.fileno(), "wb", closefd=False) as file:
                write_table(file, ".csv", COLUMNS, rows)
    except BrokenPipeError:  # the reader, such as head, has closed
        return 1
    except (ValueError, ImportError, OSError, MemoryError) as error:
        print(f"error: {shown(error)}".replace("set on_error: skip", "give --on_error skip"), file=sys.stderr)
        return 2
    return 0


def predict(runner: Runner, places: Sequence[str], batch_size: int, on_error: str) -> Iterator[list[Any]]:
    """Yield the rows of the images in some places, batch by batch."""
    sources = iter(list_sources(places))
    while batch := list(islice(sources, max(batch_size, 1))):
        for answer in runner.predict(batch, batch_size, on_error):  # type: ignore[arg-type]  # argparse checked it
            yield [answer.file, answer.label, answer.confidence, answer.exit_index + 1]


if __name__ == "__main__":
    sys.exit(main())
