"""The server on loopback: right answers, one clear answer to bad input, and nothing else disturbed."""

import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from served import COSTS, NAMES, Gate, make_bundle, make_net, parts_of, photos, until
from test_together import bundle as task

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

from dynadapter.exits.policies import Confidence, Never
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve import listening
from dynadapter.serve.bundle import load, save_bundle
from dynadapter.serve.engine import Engine
from dynadapter.serve.listening import bound, server_of
from dynadapter.serve.server import PARAMETERS, Service, Settings

PHOTOS = photos(12)
NET = make_net()
LIMITS = Settings(max_bytes=20_000, max_pixels=10_000, upload_seconds=0.4)


class Answer(NamedTuple):
    status: int
    content: Any
    headers: dict[str, str]


class Client:
    """A server in a thread, and requests to it."""

    def __init__(self, service: Service) -> None:
        self.service, self.server = service, server_of(service.app())
        self.socket = bound("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()

    def ask(self, path: str, body: Any = None, method: str = "", headers: Any = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
            answer = connection.getresponse()
            text = answer.read()
            kind = answer.headers.get("content-type", "")
            content = json.loads(text) if "json" in kind else text.decode()
            return Answer(answer.status, content, {name.lower(): value for name, value in answer.headers.items()})
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        found = text_string_to_metric_families(self.ask("/metrics").content)
        samples = [
            s for family in found for s in family.samples if s.name == name and labels.items() <= s.labels.items()
        ]
        return sum(sample.value for sample in samples)

    def open(self, text: bytes) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        made.sendall(text)
        return made


@contextlib.contextmanager
def serving(engines: dict[str, Engine], settings: Settings = LIMITS, **options: Any):
    client = Client(Service(engines, settings, **options))
    try:
        yield client
    finally:
        client.stop()


@pytest.fixture(scope="module")
def client():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listening, "HEAD_SECONDS", 0.4)
        engines = {
            "flowers": Engine(make_bundle(Confidence(0.6), NET), name="flowers"),
            "birds": Engine(make_bundle(Never(), NET), name="birds"),
        }
        with serving(engines) as made:
            yield made


# ---- good requests


def test_answers_equal_the_bundle(client):
    bundle = client.service.engines["flowers"].bundle
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda photo: client.ask("/v1/flowers/predict?top_k=3", photo), PHOTOS))
    for answer, expected in zip(answers, bundle.predict(PHOTOS, batch_size=1), strict=True):
        got = answer.content
        assert (answer.status, got["label"], got["exit"]) == (200, expected.label, expected.exit_index + 1)
        assert got["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
        assert (got["gmacs"], got["exits"], got["limited"], got["bundle"]) == (got["exit"], 3, None, "flowers")
        probabilities = [one["probability"] for one in got["top"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert len(probabilities) == 3
        assert got["milliseconds"] > 0


@pytest.mark.parametrize(
    ("query", "exit_number", "limited"),
    [
        ("birds/predict", 3, None),
        ("birds/predict?max_gmacs=2.5", 2, "max_gmacs"),
        ("birds/predict?deadline_ms=60000", 3, None),
        ("flowers/predict?threshold=0", 1, None),
        ("flowers/predict?threshold=1&max_gmacs=1", 1, "max_gmacs"),
    ],
)
def test_budget_of_a_request(client, query, exit_number, limited):
    got = client.ask(f"/v1/{query}", PHOTOS[0]).content
    assert (got["exit"], got["limited"]) == (exit_number, limited)


def test_bundles_are_described(client):
    flowers, birds = client.ask("/v1").content
    assert (flowers["name"], birds["name"]) == ("flowers", "birds")
    assert (flowers["gmacs"], flowers["policy"], flowers["on_disk"]) == ([1.0, 2.0, 3.0], "confidence_0.6", "unknown")
    assert client.ask("/v1/flowers").content == flowers | {"class_names": list(NAMES)}
    assert "/v1/{name}/predict" in client.ask("/openapi.json").content["paths"]


def test_health_and_page(client):
    assert client.ask("/health").content == {"status": "alive"}
    assert client.ask("/ready").content == {"status": "ready"}
    page = client.ask("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "Drop a photo here" in page.content
    assert "http" not in page.content.replace("http-equiv", "")


def test_metrics_count_requests(client):
    before = {
        name: client.metric(name, bundle="birds") for name in ("dynadapter_answers_total", "dynadapter_gmacs_total")
    }
    refused = client.metric("dynadapter_requests_total", bundle="birds", status="422")
    for _ in range(3):
        client.ask("/v1/birds/predict?max_gmacs=2", PHOTOS[1])
    client.ask("/v1/birds/predict", b"?")
    assert client.metric("dynadapter_answers_total", bundle="birds") == before["dynadapter_answers_total"] + 3
    assert client.metric("dynadapter_gmacs_total", bundle="birds") == before["dynadapter_gmacs_total"] + 6
    assert client.metric("dynadapter_limited_total", bundle="birds", reason="max_gmacs") >= 3
    assert client.metric("dynadapter_requests_total", bundle="birds", status="422") == refused + 1
    assert client.metric("dynadapter_open_exits", bundle="birds") == 3
    assert client.metric("process_resident_memory_bytes") > 10**7


def test_drift_is_a_metric_and_a_log_line(caplog):
    measured = {"shares": [0.0, 0.0, 1.0], "samples": 1000}
    engine = Engine(make_bundle(Confidence(0.0), NET, measured=measured), window=100, name="old")
    with serving({"old": engine}) as client, ThreadPoolExecutor(4) as pool:
        assert client.metric("dynadapter_calibrated", value="exit 3") == 1
        for photo in PHOTOS[:3]:
            client.ask("/v1/old/predict?threshold=0", photo)  # the exit of a budget tells nothing of the images
        list(pool.map(lambda k: client.ask("/v1/old/predict", PHOTOS[k % 12]), range(99)))
        assert client.metric("dynadapter_drift") == 0
        client.ask("/v1/old/predict", PHOTOS[0])
        assert (
            client.metric("dynadapter_drift", value="exit 1") == client.metric("dynadapter_live", value="exit 1") == 1
        )
    assert "old: exit 1 has a share of 1.000 in the last 100 images, in calibration 0.000" in caplog.text


def test_bundles_of_one_batch():
    parts = {"costs": COSTS, "preprocessing": Preprocess(32)}
    pair = {"flowers": task(classes=5, policy=Never(), parts=parts)}
    pair["birds"] = task(classes=3, seed=1, policy=Never(), parts=parts)
    engines = Engine.together(pair)
    asked = [(name, photo) for photo in range(12) for name in pair]
    with serving(engines) as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda one: client.ask(f"/v1/{one[0]}/predict", PHOTOS[one[1]]), asked))
        assert client.ask("/v1/birds/predict", b"?").status == 422
        assert client.metric("dynadapter_answers_total", bundle="birds") == 12
        assert client.metric("dynadapter_stage_images_total", bundle="flowers", stage="3") == 12
        assert client.metric("dynadapter_requests_total", bundle="flowers", status="422") == 0
    for (name, photo), answer in zip(asked, answers, strict=True):
        [expected] = pair[name].predict([PHOTOS[photo]])
        assert (answer.status, answer.content["bundle"]) == (200, name)
        assert (answer.content["label"], answer.content["exit"]) == (expected.label, 3)
        assert answer.content["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
    assert all(engine.closing and not engine._worker.thread.is_alive() for engine in engines.values())


# ---- bad requests


def flat(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def huge() -> bytes:
    """A PNG whose head names 10^9 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 25_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + bytes(4) + b"IDAT"
    )


BAD = {
    "not an image": (
        "flowers/predict",
        b"hello",
        {},
        422,
        "cannot be read as an image: not an image of a known format",
    ),
    "cut off": ("flowers/predict", PHOTOS[0][:100], {}, 422, "cannot be read as an image"),
    "empty": ("flowers/predict", b"", {}, 400, "the body is empty; send the bytes of an image"),
    "large": ("flowers/predict", bytes(20_001), {}, 413, "more than 20,000 bytes"),
    "many pixels": ("flowers/predict", flat(101, 100), {}, 422, "101 x 100 pixels are more than 10,000"),
    "10^9 pixels": ("flowers/predict", huge(), {}, 422, "exceeds limit"),
    "a form": ("flowers/predict", PHOTOS[0], {"Content-Type": "multipart/form-data; boundary=a"}, 415, "is a form"),
    "top_k": ("flowers/predict?top_k=0", PHOTOS[0], {}, 400, "top_k='0': Input should be greater than or equal to 1"),
    "misspelt": (
        "flowers/predict?top_k=3&treshold=0.0",
        PHOTOS[0],
        {},
        400,
        "'treshold' is not a parameter; give one of top_k, threshold, max_gmacs, deadline_ms",
    ),
    "threshold": ("flowers/predict?threshold=2", PHOTOS[0], {}, 400, "threshold='2': "),
    "no threshold": ("birds/predict?threshold=0.5", PHOTOS[0], {}, 400, "the policy never has none; leave it out"),
    "max_gmacs": ("flowers/predict?max_gmacs=0.5", PHOTOS[0], {}, 400, "below exit 1; give at least 1"),
    "deadline": ("flowers/predict?deadline_ms=1e-9", PHOTOS[0], {}, 504, "deadline passed while the image was sent"),
    "unknown": ("trees/predict", PHOTOS[0], {}, 404, "there is no bundle 'trees'; there are flowers, birds"),
    "no page": ("flowers/guess", PHOTOS[0], {}, 404, "Not Found"),
    "method": ("flowers/predict", None, {}, 405, "Method Not Allowed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_has_one_clear_answer(client, case):
    path, body, headers, status, words = BAD[case]
    counted = path.startswith(("flowers/predict", "birds/predict")) and body is not None
    labels = {"bundle": path.partition("/")[0], "status": str(status)}
    before = client.metric("dynadapter_requests_total", **labels)
    answer = client.ask(f"/v1/{path}", body, headers=headers)
    assert answer.status == status
    assert client.metric("dynadapter_requests_total", **labels) == before + counted
    assert list(answer.content) == ["error"]
    assert words in answer.content["error"]
    assert "\n" not in answer.content["error"]
    assert_undisturbed(client)


def test_parameters_are_those_of_the_description(client):
    described = client.ask("/openapi.json").content["paths"]["/v1/{name}/predict"]["post"]["parameters"]
    assert tuple(one["name"] for one in described if one["in"] == "query") == PARAMETERS


def test_too_many_connections_are_503(monkeypatch):
    """As docs/server.md has it; a larger queue cannot fill."""
    text = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")
    assert f"From {listening.CONNECTIONS:,} open connections on" in text
    assert f"no more than {listening.CONNECTIONS - 1} requests" in text
    monkeypatch.setattr(listening, "CONNECTIONS", 2)
    engine, _ = gated()
    with serving({"one": engine}) as client:
        assert client.ask("/v1/one/predict", PHOTOS[0]).status == 200
        with client.open(b"G"):
            until(lambda: client.server.server_state.connections)
            answer = client.ask("/v1/one/predict", PHOTOS[0])
            assert (answer.status, answer.headers["content-type"]) == (503, "text/plain; charset=utf-8")


def assert_undisturbed(client) -> None:
    assert client.ask("/v1/flowers/predict", PHOTOS[0]).status == 200
    until(lambda: client.service.held == 0)
    until(lambda: all(engine.taken == 0 for engine in client.service.engines.values()))


HEAD = b"POST /v1/flowers/predict HTTP/1.1\r\nHost: a\r\n"


def test_large_body_without_a_length(client):
    with client.open(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as made:
        with contextlib.suppress(OSError):  # the server closes as soon as it is too much
            for _ in range(10):
                made.sendall(b"2000\r\n" + bytes(0x2000) + b"\r\n")
        assert made.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert_undisturbed(client)


def received(made: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := made.recv(65536):
            data += part
    return data


def test_slow_body_is_answered(client):
    with client.open(HEAD + b"Content-Length: 1000\r\n\r\nabc") as made:
        answer = received(made)
    assert b"408 Request Timeout" in answer
    assert b"the body did not arrive within 0.4 seconds" in answer
    assert_undisturbed(client)


@pytest.mark.parametrize("first", [b"", HEAD + b"X-"])
def test_slow_head_is_closed(client, first):
    """Also the head of a second request on the same connection."""
    with client.open(first) as made:
        assert received(made) == b""
    with client.open(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n") as made:
        until(lambda: b"alive" in made.recv(1000))
        start = time.monotonic()
        made.sendall(first or b"G")
        assert received(made) == b""
        assert time.monotonic() - start < 4  # before uvicorn's own limit on idle connections
    assert_undisturbed(client)


@pytest.mark.parametrize("sent", [b"garbage\r\n\r\n", HEAD + b"Content-Length: 100\r\n\r\nabc"])
def test_half_a_request_is_dropped(client, sent):
    with client.open(sent):
        pass
    assert_undisturbed(client)


def gated(**options: Any) -> tuple[Engine, Gate]:
    gate = Gate()
    return Engine(make_bundle(Never(), NET), compute=gate, name="one", **options), gate


def test_client_that_leaves_is_not_computed():
    engine, gate = gated(batch=1, queue=8)
    text = b"POST /v1/one/predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(PHOTOS[0]) + PHOTOS[0]
    with serving({"one": engine}) as client:
        with gate.closed():
            first = client.open(text)  # runs at the lock
            gate.holds()
            with client.open(text):
                until(lambda: any(map(any, engine._worker.queues)))
            until(lambda: client.metric("dynadapter_requests_total", status="499") == 1)
        assert b"200 OK" in first.recv(1000)
        first.close()
        until(lambda: engine.taken == 0)
        assert engine.counts.images[0] == 1


def test_full_queue_is_429_with_retry_after():
    engine, gate = gated(batch=1, queue=4)
    with serving({"one": engine}) as client, ThreadPoolExecutor(4) as pool:
        with gate.closed():
            waiting = [pool.submit(client.ask, "/v1/one/predict", photo) for photo in PHOTOS[:4]]
            until(engine.is_full)
            answer = client.ask("/v1/one/predict", PHOTOS[4])
            assert (answer.status, answer.content) == (
                429,
                {"error": "4 images wait already; send this one again later"},
            )
            assert int(answer.headers["retry-after"]) >= 1
        assert [one.result().status for one in waiting] == [200] * 4
        limits = [one.result().content["limited"] for one in waiting]
        assert "load" in limits  # exits were closed before


def test_uploads_share_a_limit_of_bytes():
    settings = Settings(max_bytes=20_000, max_uploads=25_000)
    engine, _ = gated(batch=1, queue=4)
    with serving({"one": engine}, settings) as client:
        with client.open(HEAD.replace(b"flowers", b"one") + b"Content-Length: 20000\r\n\r\n" + bytes(19_000)):
            until(lambda: client.service.held == 19_000)
            assert client.ask("/v1/one/predict", bytes(15_000)).status == 429
            assert client.ask("/v1/one/predict", PHOTOS[0]).status == 200
        until(lambda: client.service.held == 0)


def test_failed_stage_is_500(monkeypatch, caplog):
    engine, _ = gated()
    with serving({"one": engine}) as client:
        with monkeypatch.context() as patch:
            patch.setattr(engine.bundle.net, "begin", lambda *_: exec("raise RuntimeError('broken\\nin two')"))
            answer = client.ask("/v1/one/predict", PHOTOS[0])
        message = "stage 1 failed on its batch (RuntimeError: broken in two)"
        assert (answer.status, answer.content) == (500, {"error": message})
        assert client.ask("/v1/one/predict", PHOTOS[0]).status == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_thread_is_started_by_ready(monkeypatch):
    engine, _ = gated()
    with serving({"one": engine}) as client, ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(engine._worker, "_next", lambda: exec("raise SystemExit"))
            waiting = pool.submit(client.ask, "/v1/one/predict", PHOTOS[0])
            until(lambda: engine.taken == 1 and not engine._worker.thread.is_alive())
        assert client.ask("/ready").status == 200
        assert waiting.result().status == 200


def test_stop_answers_what_waits():
    engine, gate = gated(batch=1, queue=8)
    client = Client(Service({"one": engine}, LIMITS))
    with ThreadPoolExecutor(3) as pool:
        with gate.closed():
            waiting = [pool.submit(client.ask, "/v1/one/predict", photo) for photo in PHOTOS[:3]]
            until(lambda: engine.taken == 3)
            client.server.should_exit = True
            until(lambda: refuses(client.port))
        assert [one.result().status for one in waiting] == [200] * 3
    client.stop()
    assert not client.thread.is_alive()
    assert engine.closing
    assert not engine._worker.thread.is_alive()


def test_stop_counts_what_it_cuts_off(monkeypatch):
    monkeypatch.setattr(listening, "GRACE", 0.2)
    engine, gate = gated(batch=1, queue=8)
    client = Client(Service({"one": engine}, LIMITS))
    assert client.ask("/v1/one/predict", PHOTOS[0]).status == 200
    with ThreadPoolExecutor(2) as pool:
        with gate.closed():
            waiting = [pool.submit(client.ask, "/v1/one/predict", photo) for photo in PHOTOS[:2]]
            until(lambda: engine.taken == 2)
            client.server.should_exit = True
            assert [one.result().status for one in waiting] == [500, 500]
    client.stop()
    assert (client.service.answered, client.service.cut_off, engine.taken) == (1, 2, 0)


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return True
    return False


def test_replaced_bundle_keeps_answering(tmp_path):
    place = save_bundle(NET, tmp_path / "one", **parts_of(NET, Never()))
    engine = Engine(load(place), name="one")
    with serving({"one": engine}, places={"one": place}) as client:
        before = client.ask("/v1/one/predict", PHOTOS[0]).content
        assert client.ask("/v1/one").content["on_disk"] == "as loaded"
        for policy, state in ((Confidence(0.9), "replaced"), (Never(), "as loaded")):  # the same tensors
            save_bundle(NET, place, **parts_of(NET, policy), overwrite=True)
            assert client.ask("/v1/one").content["on_disk"] == state
        (place / "config.json").write_text('{"sha256": "of another"}')
        assert client.ask("/v1/one").content["on_disk"] == "replaced"
        after = client.ask("/v1/one/predict", PHOTOS[0]).content
        place.rename(tmp_path / "away")
        assert client.ask("/v1/one").content["on_disk"] == "removed"
    assert [got | {"milliseconds": 0} for got in (before, after)] == [before | {"milliseconds": 0}] * 2
