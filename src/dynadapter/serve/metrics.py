"""The metrics of a server in the format of Prometheus, read from the engines at each request."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynadapter.serve.engine import Engine

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics(Collector):
    """Count requests, and describe the engines."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines
        self.registry = CollectorRegistry()
        words = "Requests by the status of their answer; 499 if the client left"
        self.requests = Counter("dynadapter_requests", words, ["bundle", "status"], registry=self.registry)
        self.seconds = Histogram(
            "dynadapter_request_seconds",
            "Time from the head of a request to its answer with a label",
            ["bundle"],
            buckets=SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the engines."""
        yield from self._work()
        yield from self._load()
        yield from self._drift()

    def _work(self) -> Iterator[Metric]:
        answers = CounterMetricFamily("dynadapter_answers", "Answers by exit", labels=["bundle", "exit"])
        limited = CounterMetricFamily(
            "dynadapter_limited", "Answers that stopped before the policy let them", labels=["bundle", "reason"]
        )
        gmacs = CounterMetricFamily("dynadapter_gmacs", "Cost of the answers in GMACs", labels=["bundle"])
        runs = CounterMetricFamily("dynadapter_stage_batches", "Batches by stage", labels=["bundle", "stage"])
        images = CounterMetricFamily("dynadapter_stage_images", "Images in them", labels=["bundle", "stage"])
        seconds = CounterMetricFamily("dynadapter_compute_seconds", "Time in the network", labels=["bundle"])
        for name, engine in self.engines.items():
            counts = engine.counts
            for k in range(engine.exits):
                answers.add_metric([name, str(k + 1)], counts.exits[k])
                runs.add_metric([name, str(k + 1)], counts.runs[k])
                images.add_metric([name, str(k + 1)], counts.images[k])
            for reason in ("max_gmacs", "deadline", "load"):
                limited.add_metric([name, reason], counts.limited[reason])
            cost = sum(number * each for number, each in zip(counts.exits, engine.costs.gmacs, strict=True))
            gmacs.add_metric([name], cost)
            seconds.add_metric([name], counts.seconds)
        yield from (answers, limited, gmacs, runs, images, seconds)

    def _load(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("dynadapter_waiting", "Images accepted and not answered", labels=["bundle"])
        queue = GaugeMetricFamily("dynadapter_queue", "Most images that are accepted at a time", labels=["bundle"])
        exits = GaugeMetricFamily("dynadapter_open_exits", "Exits open under the present load", labels=["bundle"])
        for name, engine in self.engines.items():
            waiting.add_metric([name], engine.taken)
            queue.add_metric([name], engine.queue)
            exits.add_metric([name], engine.open_exits())
        yield from (waiting, queue, exits)

    def _drift(self) -> Iterator[Metric]:
        live = GaugeMetricFamily(
            "dynadapter_live", "Exit shares and mean confidence of the last window", labels=["bundle", "value"]
        )
        expected = GaugeMetricFamily("dynadapter_calibrated", "The same in calibration", labels=["bundle", "value"])
        drift = GaugeMetricFamily(
            "dynadapter_drift", "1 if the value left the interval of the calibration", labels=["bundle", "value"]
        )
        for name, engine in self.engines.items():
            for value, one in engine.drift.expected.items():
                expected.add_metric([name, value], one.value)
                drift.add_metric([name, value], value in engine.drift.outside)
            for value, number in engine.drift.live.items():
                live.add_metric([name, value], number)
        yield from (live, expected, drift)
