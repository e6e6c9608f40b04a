"""The programs that can run the graphs of an exported folder; each opens a graph as one function."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Provider = str | tuple[str, dict[str, Any]]
Array = NDArray[Any]
Session = Callable[[Sequence[str], Mapping[str, Array]], list[Array]]
"""Maps the names of outputs, and the inputs by name, to those outputs. Several threads may call it."""


class Engine(Protocol):
    """A program that runs graphs.

    Attributes:
        name: For messages.
        on_cpu: Whether graphs run on the CPU alone.
    """

    name: str
    on_cpu: bool

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raise a ValueError for a folder whose graphs this engine does not run."""

    def open(self, graph: bytes) -> Session:
        """Open a graph, given by its bytes: not every engine takes a path that is not UTF-8."""


class OnnxRuntime:
    """ONNX Runtime; see :class:`~dynadapter.serve.runtime.Runner` for the arguments.

    Raises:
        ValueError: This ONNX Runtime has no such provider.
        ImportError: It is not installed.
    """

    name = "ONNX Runtime"

    def __init__(self, providers: Sequence[Provider] | None, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("an exported folder needs ONNX Runtime: pip install onnxruntime") from error
        self.providers = list(providers or ["CPUExecutionProvider"])
        available = onnxruntime.get_available_providers()
        for provider in self.providers:
            name = provider if isinstance(provider, str) else provider[0]
            if name not in available:
                raise ValueError(f"this ONNX Runtime has no provider {name!r}; choose from: {', '.join(available)}")
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3  # errors become exceptions; warnings concern the exporter
        self._options.intra_op_num_threads = threads or 0
        # Each stage has its own threads; idle ones would spin and slow down the stage that runs.
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.on_cpu = self.providers == ["CPUExecutionProvider"]
        if self.on_cpu:
            _share_memory(onnxruntime, self._options)
        self._create = onnxruntime.InferenceSession

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Accept every folder."""

    def open(self, graph: bytes) -> Session:
        """Open a graph."""
        session: Session = self._create(graph, self._options, providers=self.providers).run
        return session


class OpenVino:
    """OpenVINO on the CPU, in the graphs' own precision: float32, or the 8 bits of ``export --int8 static``.

    Its own choice on processors with 16-bit arithmetic is bfloat16, whose rounding makes token merging choose other
    tokens.

    Raises:
        ValueError: There are providers, which belong to ONNX Runtime.
        ImportError: It is not installed.
    """

    name = "OpenVINO"
    on_cpu = True

    def __init__(self, providers: Sequence[Provider] | None, threads: int | None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ImportError("engine=openvino needs OpenVINO: pip install 'dynadapter[openvino]'") from error
        if providers:
            raise ValueError(f"providers={list(providers)} belong to ONNX Runtime; leave them out for OpenVINO")
        self._core = openvino.Core()
        self._settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            self._settings["INFERENCE_NUM_THREADS"] = str(threads)

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Refuse graphs that ONNX Runtime quantised."""
        found = manifest.get("quantization")
        static = isinstance(found, dict) and found.get("way") == "static"
        if manifest.get("precision", "float32") != "float32" and not static:
            raise ValueError(
                f"the folder is in {manifest['precision']} for ONNX Runtime; for OpenVINO export it with "
                "--int8 static, or without int8"
            )

    def open(self, graph: bytes) -> Session:
        """Open a graph; each thread gets a request of its own."""
        compiled = self._core.compile_model(self._core.read_model(graph, b""), "CPU", self._settings)
        own = threading.local()

        def run(outputs: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            contiguous = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            found = own.request.infer(contiguous, share_inputs=True)
            return [np.array(found[name]) for name in outputs]  # the request reuses its memory

        return run


ENGINES: dict[str, Callable[[Sequence[Provider] | None, int | None], Engine]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}
"""By the names that :class:`~dynadapter.serve.runtime.Runner` takes."""


def _share_memory(onnxruntime: Any, options: Any) -> None:
    """Configure a session to allocate from the arena that all such sessions of the process share.

    Otherwise each session keeps all memory that it has ever needed, and the caches do not help the next stage. ONNX
    Runtime's memory patterns would prevent this, so they are off.
    """
    info = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    with contextlib.suppress(Exception):  # registered before, by another runner or by the application
        onnxruntime.create_and_register_allocator(info, None)
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # so that weights are freed
    options.enable_mem_pattern = False
