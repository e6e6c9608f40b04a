"""Three tiny backbones, one of each family, each six blocks deep, and images that fit them all."""

import copy
import functools
import importlib
import io
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY
from torch import Tensor, nn

from dynadapter.backbones import create_backbone
from dynadapter.cli import main
from dynadapter.cli.app import DynCLI
from dynadapter.cli.ray_session import LOOPBACK
from dynadapter.exits.policies import Confidence

# A shell without a terminal starts jobs that ignore these signals, which tests send
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

torch.set_num_threads(1)  # for tensors this small a second thread costs more than it does

CLASSES = 5
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2, 2),
    "num_heads": (2, 2, 4),
}
CONVNEXT = {"patch_size": 2, "dims": (16, 24, 32, 48), "depths": (2, 1, 2, 1), "ls_init_value": 1.0}


class Copies:
    """Copy one network again and again, in a fifth of the time of ``copy.deepcopy``: a pickle without the tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[int, Tensor] = {}
        file = io.BytesIO()
        pickler = pickle.Pickler(file)
        pickler.persistent_id = self._keep
        pickler.dump(model)
        self.rest = file.getvalue()

    def _keep(self, part: object) -> int | None:
        if not isinstance(part, Tensor):
            return None
        self.tensors[id(part)] = part
        return id(part)

    def __call__(self) -> nn.Module:
        unpickler, made = pickle.Unpickler(io.BytesIO(self.rest)), {}
        unpickler.persistent_load = lambda key: copy.deepcopy(self.tensors[key], made)
        return unpickler.load()


@functools.cache
def _copies(name: str, num_classes: int, changes: tuple[tuple[str, Any], ...]) -> Copies:
    return Copies(create_backbone(name, num_classes, **dict(changes)))


def _make(name: str, num_classes: int, settings: dict[str, Any]) -> nn.Module:
    """A copy of the network that these settings give; a copy takes a fraction of the time of a build."""
    return _copies(name, num_classes, tuple(settings.items()))()


def make_vit(num_classes: int = CLASSES, **changes) -> nn.Module:
    """A ViT with a class token and 16 patches: blocks give (batch, 17, 48)."""
    return _make("vit_tiny_patch16_224", num_classes, VIT | changes)


def make_swin(num_classes: int = CLASSES, **changes) -> nn.Module:
    """A Swin of three stages: (batch, 16, 16, 16), (batch, 8, 8, 32), (batch, 4, 4, 64) after two blocks each."""
    return _make("swin_tiny_patch4_window7_224", num_classes, SWIN | changes)


def make_convnext(num_classes: int = CLASSES, **changes) -> nn.Module:
    """A ConvNeXt with linear MLPs: channels 16, 16, 24, 32, 32, 48 after its blocks.

    The layer scale starts at 1, as after training; timm's 1e-6 would hide whatever a block does.
    """
    return _make("convnext_tiny", num_classes, CONVNEXT | changes)


BACKBONES: dict[str, Callable[..., nn.Module]] = {"vit": make_vit, "swin": make_swin, "convnext": make_convnext}


@pytest.fixture
def vit() -> nn.Module:
    return make_vit()


@pytest.fixture
def swin() -> nn.Module:
    return make_swin()


@pytest.fixture
def convnext() -> nn.Module:
    return make_convnext()


@pytest.fixture(params=BACKBONES)
def any_backbone(request: pytest.FixtureRequest) -> nn.Module:
    return BACKBONES[request.param]()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of ``conf/tiny.yaml``, which no test may change."""
    root = tmp_path_factory.mktemp("tiny")
    main(["fit", "-c", TINY, f"--trainer.default_root_dir={root}"])
    return root / "version_0"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on drawn shapes, long enough that the exits differ; return the checkpoint, which no test may change."""
    root = tmp_path_factory.mktemp("runs")
    more = ["--trainer.limit_train_batches=1.0", "--trainer.max_epochs=2", "--trainer.logger=false"]
    main(["fit", "-c", TINY, f"--trainer.default_root_dir={root}", "--model.optimizer.lr=0.01", *more])
    return root / "version_0" / "checkpoints" / "last.ckpt"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """Copy the checkpoint into a run folder of its own."""
    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    return Path(shutil.copy(trained, folder))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DynCLI]:
    """Return a function that builds everything that a command line stands for, and runs nothing."""

    def build(*args: str | Path) -> DynCLI:
        made: list[DynCLI] = []
        monkeypatch.setattr(DynCLI, "run", lambda self: made.append(self))
        main([str(arg) for arg in args])
        return made[0]

    return build


@pytest.fixture(scope="module")
def program() -> Iterator[Callable[[str], Any]]:
    """Import a program from the folder of benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
        yield importlib.import_module


@pytest.fixture
def alone_on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test start Ray on this machine, as a command does that nothing has imported Ray before."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(LOOPBACK, "0")
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'dynadapter[ray]'")


def parting(logits: Tensor) -> Confidence:
    """Return the policy that parts these images, from their logits at the first exit.

    Its threshold is the middle of the widest gap between two confidences. Where one image lies on the threshold, the
    last bit of a kernel decides about it, and another machine decides otherwise.
    """
    confidences = logits.float().softmax(-1).amax(-1).sort().values
    widest = int(confidences.diff().argmax())
    return Confidence(confidences[widest : widest + 2].mean().item())


@contextmanager
def raises_one_line(*kinds: type[Exception], match: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Require an error of one of these kinds whose message is one line that matches."""
    with pytest.raises(kinds, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``cuda`` where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
