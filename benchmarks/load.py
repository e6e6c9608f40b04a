"""Load servers on loopback: `dynadapter serve`, and two servers that one could write instead.

    python benchmarks/load.py
    python benchmarks/load.py --bundle runs/photos/bundle --images photos --clients 1 8 32 200

*engine* is the server of the package, and *waiting* the same with `--wait_ms 100`. *threads* is FastAPI with the same
bundle, each image alone on a thread of its pool. *static* is the same with the whole backbone and no exits. The load
comes from one core and each server runs on another, with one thread of torch. Every client sends the next photo when
the answer to the last one is there. In each round every arm is loaded once, in a new random order; *static* runs twice,
and its two throughputs tell a void run. Latencies are percentiles over all rounds. Without ``--bundle`` the backbone
has random weights, and thresholds that give exit shares of 50/30/15/5 on the photos, which are drawn.
"""

import argparse
import http.client
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SHARES, Line, Log, Row, arguments, backbones, build, control, show
from PIL import Image

from dynadapter import BackboneSource, Balanced, load, save_bundle
from dynadapter.backbones import fingerprint
from dynadapter.bench.timing import percentile, ratio, share_thresholds
from dynadapter.cost import exit_costs
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import find_images

ARMS = ("engine", "waiting", "threads", "static", "control")
CLIENTS = (1, 8, 32)
PHOTOS = 64
MIX = "50/30/15/5"


@dataclass
class Seen:
    """What the clients of one arm saw.

    Args:
        throughput: Images a second, by round.
        milliseconds: Time to each answer with a label.
        statuses: Answers by status.
        exits: Answers by exit.
        limited: Answers that the load stopped early.
    """

    throughput: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    limited: int = 0

    def line(self, exits: int) -> Line:
        """Return the numbers as they are written."""
        answers = max(1, sum(self.exits.values()))
        shares = [self.exits[k + 1] / answers for k in range(exits)]
        tails = {f"p{share}": percentile(self.milliseconds or [float("nan")], share / 100) for share in (50, 95, 99)}
        statuses = {str(status): count for status, count in sorted(self.statuses.items())}
        rest = {"shares": shares, "statuses": statuses, "limited": self.limited}
        return {"throughput": self.throughput, **tails, **rest}


# ---- photos and the bundle


def drawn(count: int) -> list[bytes]:
    """Return photos of soft noise, as JPEG of 256 pixels."""
    rng, photos = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    return photos


def made(options: dict[str, Any], photos: list[bytes], place: Path) -> Path:
    """Write a bundle of random weights whose thresholds give the exit shares on the photos."""
    size = int(options["img_size"])
    backbone, net = build(**options)
    arguments = {name: value for name, value in options.items() if name != "name"}
    parts: dict[str, Any] = {
        "backbone": BackboneSource(options["name"], fingerprint(backbone), "file", arguments),
        "adapter": None,
        "heads": Balanced(),
        "class_names": [str(k) for k in range(net.num_classes)],
        "preprocessing": (preprocess := Preprocess(size)),
        "costs": exit_costs(net, size),
        "whole": True,
    }
    images = torch.from_numpy(preprocess.normalize(np.stack([preprocess.read(photo) for photo in photos])))
    with torch.inference_mode():
        logits = torch.cat([net(part) for part in images.split(8)], dim=1)
    return save_bundle(net, place, policy=share_thresholds(logits, SHARES[MIX]), **parts)


# ---- load


@contextmanager
def server(arm: str, bundle: Path, args: argparse.Namespace) -> Iterator[int]:
    """Run the server of an arm on a core of its own, and yield its port."""
    program = Path(__file__).with_name("load_server.py")
    line = [sys.executable, str(program), arm.replace("control", "static"), str(bundle)]
    line += ["--core", str(args.cores[1])] * (len(args.cores) > 1) + ["--weights", args.weights] * bool(args.weights)
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        port = process.stdout.readline()
        if not port:
            raise SystemExit(f"the server of the arm {arm} did not start")
        try:
            for _ in range(600):  # the port is printed just before the server listens
                try:
                    http.client.HTTPConnection("127.0.0.1", int(port)).connect()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            yield int(port)
        finally:
            process.stdin.close()


def client(port: int, photos: list[bytes], number: int, end: float, seen: Seen, lock: threading.Lock) -> None:
    """Send photos one after the other until the time is over."""
    place = 7 * number
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        while time.perf_counter() < end:
            start = time.perf_counter()
            connection.request("POST", "/v1/net/predict", photos[place % len(photos)])
            answer = connection.getresponse()
            found, place = json.loads(answer.read()), place + 1
            with lock:
                seen.statuses[answer.status] += 1
                if answer.status == 200:
                    seen.milliseconds.append(1000 * (time.perf_counter() - start))
                    seen.exits[found["exit"]] += 1
                    seen.limited += found.get("limited") == "load"
            if answer.status == 429:
                time.sleep(0.05)  # far less than Retry-After, so that the queue stays full


def run(port: int, photos: list[bytes], clients: int, seconds: float, seen: Seen) -> None:
    """Load one server for some seconds; raise the error of a client, without which the throughput would be wrong."""
    lock, start, before = threading.Lock(), time.perf_counter(), seen.statuses[200]
    with ThreadPoolExecutor(clients) as pool:
        line = (port, photos)
        each = [pool.submit(client, *line, number, start + seconds, seen, lock) for number in range(clients)]
    for one in each:
        one.result()
    seen.throughput.append((seen.statuses[200] - before) / (time.perf_counter() - start))


def load_case(ports: dict[str, int], photos: list[bytes], clients: int, exits: int, args: argparse.Namespace) -> Line:
    """Load all arms in turn."""
    seen, order = {arm: Seen() for arm in ports}, random.Random(0)
    for port in ports.values():
        run(port, photos, clients, args.seconds / 4, Seen())
    for _ in range(args.rounds):
        for arm in order.sample(list(ports), len(ports)):
            run(ports[arm], photos, clients, args.seconds, seen[arm])
    line: Line = {arm: found.line(exits) for arm, found in seen.items()}
    same = ratio(seen["control"].throughput, seen["static"].throughput)
    return {"control": same, "arms": line, "photo_bytes": sum(map(len, photos)) // len(photos)}


# ---- the program


def rows(line: Line) -> list[Row]:
    """Return the table rows of a line."""
    found: list[Row] = []
    against = line["arms"]["threads"]["throughput"]
    for arm, got in line["arms"].items():
        first: Row = {"backbone": line["key"]["backbone"], "clients": line["key"]["clients"]}
        first |= {"control": control(line)} if not found else {}
        first |= {"arm": arm, "images/s": sum(got["throughput"]) / len(got["throughput"])}
        first |= {"over threads": ratio(got["throughput"], against)}
        first |= {f"{name}, ms": got[name] for name in ("p50", "p95", "p99")}
        refused = sum(count for status, count in got["statuses"].items() if status != "200")
        shares = "/".join(f"{100 * share:.0f}" for share in got["shares"])
        found.append(first | {"shares, %": shares, "stopped by load": got["limited"], "refused": refused})
    return [found[0], *({name: row[name] for name in row if name not in ("backbone", "clients")} for row in found[1:])]


def lines_of(name: str, bundle: Path | None, options: dict[str, Any], args: argparse.Namespace, log: Log) -> list[Line]:
    """Run the cases of one bundle that have no line yet, and return all lines."""
    keys = [
        {"backbone": name, "clients": clients, "rounds": args.rounds, "seconds": args.seconds, "shares": args.mix}
        for clients in args.clients
    ]
    with ExitStack() as stack:
        if all(log.find(key) for key in keys):
            return [log.find(key) or {} for key in keys]
        photos = [path.read_bytes() for path in find_images(args.images)] if args.images else drawn(PHOTOS)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "bundle"
        bundle = bundle or made(options, photos, place)
        exits = load(bundle, args.weights).net.num_exits
        ports = {arm: stack.enter_context(server(arm, bundle, args)) for arm in ARMS}
        for key in keys:
            if log.find(key) is None:
                log.add(key, **load_case(ports, photos, key["clients"], exits, args))
        return [log.find(key) or {} for key in keys]


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print a table."""
    parser = arguments(__doc__ or "", "load.jsonl")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for an arm in a round")
    parser.add_argument("--bundle", help="a bundle instead of random weights")
    parser.add_argument("--weights", help="file of its backbone's weights")
    parser.add_argument("--images", help="folder of photos; give that of the bundle's task")
    parser.set_defaults(rounds=5)
    args = parser.parse_args(argv)
    args.device = "cpu"
    args.mix = MIX if args.bundle is None else "calibrated"
    args.cores = sorted(os.sched_getaffinity(0))
    if len(args.cores) > 1:
        os.sched_setaffinity(0, {args.cores[0]})
    torch.set_num_threads(1)
    log = Log(args.out)
    try:
        if args.bundle is not None:
            place = Path(args.bundle)
            lines = lines_of(place.resolve().parent.name, place, {}, args, log)
        else:
            found = backbones(args).items()
            lines = [line for name, options in found for line in lines_of(name, None, options, args, log)]
    finally:
        os.sched_setaffinity(0, args.cores)
    show(row for line in lines for row in rows(line))


if __name__ == "__main__":
    main()
