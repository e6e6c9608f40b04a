"""``dynadapter serve``: classify images over HTTP with one or several bundles."""

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dynadapter.cli.errors import Mistake, mistakes, stopping_signals
from dynadapter.cli.networks import BACKEND, BUNDLE, WEIGHTS, check_bundle, load_network
from dynadapter.cli.parser import CommandParser, Options

if TYPE_CHECKING:  # torch takes seconds to load, and invalid input is answered without it
    import socket

    from dynadapter.serve.engine import Engine

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OPTIONS: Options = {
    "host": (str, "127.0.0.1", "Address to listen on; 0.0.0.0 for all addresses of the machine."),
    "port": (int, 8000, "Port to listen on; 0 for a free one, which is printed."),
    "batch": (int, 16, "Images in a full batch of a stage."),
    "queue": (int, 128, "Images of a bundle that are accepted and not answered; more get 429."),
    "wait_ms": (float, 0.0, "Longest wait of an image for a full batch, at each stage."),
    "threads": (int | None, None, "Threads that compute; by default torch's own number, which OMP_NUM_THREADS sets."),
    "readers": (int, 2, "Threads of each bundle that decode images."),
    "max_bytes": (int, 2**24, "Largest image file."),
    "max_pixels": (int, 40_000_000, "Largest image."),
    "upload_seconds": (float, 10.0, "Time in which a body must arrive."),
    "drift_window": (int, 500, "Images after which exits and confidence are compared with the calibration."),
    **WEIGHTS,
    "together": (bool, False, "Run all bundles in one batch: one backbone, LoRA or FacT of each, by torch."),
    **BACKEND,
}
LEAST: dict[str, float] = {
    "batch": 1,
    "readers": 1,
    "max_bytes": 1,
    "max_pixels": 1,
    "drift_window": 100,
    "threads": 1,
    "wait_ms": 0,
}
LEAST |= {"port": 0, "upload_seconds": 0.1}


def parser() -> CommandParser:
    """Return the parser of the command."""
    made = CommandParser(
        "serve",
        "Classify images over HTTP: POST the bytes of an image to /v1/NAME/predict, or open the page / in a browser.",
        short=True,
    )
    words = f"{BUNDLE[0].upper()}{BUNDLE[1:]}; one or several, each as PLACE or NAME=PLACE."
    made.add_argument("--bundle", nargs="+", required=True, help=words)
    made.add_options(OPTIONS)
    return made


def run(args: list[str]) -> None:
    """Run the command until a signal stops it; accepted requests are answered first, in a limited time."""
    given = parser().parse_args(args)
    places = read(given)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise Mistake(f"serve needs {', '.join(missing)}; install what it needs: pip install 'dynadapter[serve]'")
    from dynadapter.serve.listening import bound

    with _refusing(given):
        listening = bound(given.host, given.port)
    with listening:
        _serve(given, places, listening)


@contextmanager
def _refusing(given: Any) -> Iterator[None]:
    """Raise an OSError of the address as one line."""
    try:
        yield
    except OSError as error:
        raise Mistake(
            f"cannot listen on {given.host}:{given.port} ({error.strerror}); give --host, or --port"
        ) from error


def read(given: Any) -> dict[str, str]:
    """Return the places of the bundles by name, after a check of all settings."""
    for name, least in LEAST.items():
        if given[name] is not None and not given[name] >= least:
            raise Mistake(f"{name}={given[name]} must be at least {least}")
    if given.port > 65535:
        raise Mistake(f"port={given.port} must be at most 65535")
    if given.queue <= given.batch:
        raise Mistake(f"queue={given.queue} must be above batch={given.batch}")
    places: dict[str, str] = {}
    for one in given.bundle:
        name, equals, place = one.partition("=")
        if not equals or "/" in name:
            path = one.partition("@")[0] if one.startswith("hf-hub:") else one  # a revision may have slashes
            name, place = re.sub(r"@.*", "", Path(path).name.rpartition(":")[2]), one
        if not NAME.fullmatch(name):
            raise Mistake(
                f"{name!r} is not a valid name for a path; give letters, digits, '.', '-' and '_', as in "
                f"flowers={place}"
            )
        if name in places:
            raise Mistake(f"two bundles have the name {name}; give them as NAME=PLACE, as in {name}2={place}")
        check_bundle(place)
        places[name] = place
    _check_together(given, len(places))
    return places


def _check_together(given: Any, bundles: int) -> None:
    if not given.together:
        return
    if bundles < 2:
        raise Mistake("--together true needs at least two bundles; give more, or leave it out")
    if given.backend != "torch":
        raise Mistake(f"--together true runs by torch, not by --backend {given.backend}; leave one of them out")


def _serve(given: Any, places: dict[str, str], listening: "socket.socket") -> None:
    import torch

    from dynadapter.serve.listening import server_of
    from dynadapter.serve.server import Service, Settings

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    if given.threads:
        torch.set_num_threads(given.threads)
    engines = _engines(given, places)
    settings = Settings(given.max_bytes, given.max_pixels, given.upload_seconds, max(2**28, given.max_bytes))
    folders = {
        name: Path(os.path.expanduser(place)) for name, place in places.items() if not place.startswith("hf-hub:")
    }
    service = Service(engines, settings, folders)
    server = server_of(service.app())
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    with _refusing(given):  # another server may have been started on this port at the same time
        listening.listen()
    for name in engines:
        print(f"POST an image to {address}/v1/{name}/predict")
    print(f"or drop one on {address}/", flush=True)
    if threading.current_thread() is threading.main_thread():
        for number in stopping_signals():  # all of them stop it gracefully
            signal.signal(number, server.handle_exit)
    with suppress(KeyboardInterrupt):  # uvicorn has stopped gracefully, and raises it again
        server.run(sockets=[listening])
    print(f"stopped; {service.answered:,} images were answered; {_left(service.cut_off)}", flush=True)


def _left(cut_off: int) -> str:
    """Return what became of the requests that were accepted and not answered."""
    from dynadapter.serve.listening import GRACE

    if not cut_off:
        return "no accepted request is left"
    return (
        f"{cut_off:,} accepted requests were not, because the server waits {GRACE} seconds for them, or until a second "
        "Ctrl-C"
    )


def _engines(given: Any, places: dict[str, str]) -> dict[str, "Engine"]:
    """Load the bundles; bundles of one backbone share its tensors, and bundles on a CPU take turns or share batches."""
    from dynadapter.serve.engine import Engine
    from dynadapter.serve.sharing import share_backbones

    own = {"ckpt_path": None, "policy": None, "threshold": None, "device": given.device, "backend": given.backend}
    weights = {name: given[name] for name in WEIGHTS}
    needing = [name for name, place in places.items() if any(weights.values()) and _needs_weights(place)]
    bundles = {}
    for name, place in places.items():
        settings = weights if name in needing or not needing else dict.fromkeys(weights)
        bundles[name] = load_network(Namespace(bundle=place, **settings, **own), batch_size=given.batch)
    if saved := share_backbones(bundles.values()):
        print(f"one backbone serves several bundles: {saved / 1e6:.1f} MB are held once")
    wait, turns = given.wait_ms / 1000, threading.Lock()
    sizes = {"batch": given.batch, "queue": given.queue, "readers": given.readers, "window": given.drift_window}
    if given.together:
        with mistakes("--together true: ", ", without --together"):
            engines = Engine.together(bundles, **sizes, wait=wait)
        print(f"{', '.join(engines)} run in one batch")
    else:
        engines = {
            name: Engine(bundle, **sizes, wait=wait, compute=turns, name=name) for name, bundle in bundles.items()
        }
    for name, engine in engines.items():
        if not engine.drift.expected:
            print(f"{name} stores no calibration of its own to compare with: drift is not watched")
    return engines


def _needs_weights(place: str) -> bool:
    """Check whether a bundle has no backbone of its own; True for one that cannot be read, so that load refuses it."""
    from dynadapter.serve.bundle.hub import local
    from dynadapter.serve.bundle.reading import read_config

    with suppress(ValueError, OSError):
        config = read_config(local(place))
        return not config.whole and config.backbone.origin != "seed"
    return True
