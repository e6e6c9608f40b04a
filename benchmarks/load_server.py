"""One arm of load.py: a server on loopback. It prints its port, and ends when its input does.

python benchmarks/load_server.py engine BUNDLE
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from dynadapter import Bundle, lay_out_for_cpu, load
from dynadapter.serve.engine import Engine
from dynadapter.serve.listening import bound, server_of
from dynadapter.serve.server import Service, Settings

ARMS = ("engine", "waiting", "threads", "static")


def plain(classify: Callable[[bytes], dict[str, Any]]) -> Any:
    """Return the server that one writes first: FastAPI, and each image alone on a thread of its pool."""
    from fastapi import FastAPI, Request
    from starlette.concurrency import run_in_threadpool

    app = FastAPI()

    @app.post("/v1/net/predict")
    async def predict(request: Request) -> dict[str, Any]:
        return await run_in_threadpool(classify, await request.body())

    return app


def routed(bundle: Bundle) -> Callable[[bytes], dict[str, Any]]:
    """Return a function that classifies by the bundle."""

    def classify(data: bytes) -> dict[str, Any]:
        [(label, confidence, exit_index)] = bundle.predict([data])
        return {"label": label, "confidence": confidence, "exit": exit_index + 1}

    return classify


def static(bundle: Bundle) -> Callable[[bytes], dict[str, Any]]:
    """Return a function that classifies by the whole backbone and its own head."""
    net, last = bundle.net.at(-1).eval(), bundle.net.num_exits

    @torch.inference_mode()
    def classify(data: bytes) -> dict[str, Any]:
        confidence, best = net(bundle.read(data)[None]).softmax(-1)[0].max(-1)
        return {"label": bundle.class_names[int(best)], "confidence": float(confidence), "exit": last}

    return classify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("bundle")
    parser.add_argument("--core", type=int, help="run on this core alone")
    parser.add_argument("--weights", help="file of the backbone's weights")
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    bundle = load(args.bundle, args.weights)
    lay_out_for_cpu(bundle.net)
    if args.arm in ("engine", "waiting"):
        engine = Engine(bundle, name="net", wait=0.1 if args.arm == "waiting" else 0.0)
        app = Service({"net": engine}, Settings()).app()
    else:
        app = plain((routed if args.arm == "threads" else static)(bundle))
    listening, server = bound("127.0.0.1", 0), server_of(app)

    def wait() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=wait, daemon=True).start()
    print(listening.getsockname()[1], flush=True)
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
