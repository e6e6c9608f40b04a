"""Lists of videos: frames by hand, clips of known content, and what is refused. The network is in test_videomae.py."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused
from PIL import Image

import dynadapter
from dynadapter.cli import main
from dynadapter.data import Augment, UnreadableImage, VideoLists, clips
from dynadapter.data.clips import Clip, Sampling, frame_indices
from dynadapter.data.verify import verify
from dynadapter.images.memory import Budget
from dynadapter.training.module import ExitClassifier

SIZE, COUNT = (40, 32), 20  # width and height, frames


# ---- which frames


@pytest.mark.parametrize(
    ("count", "frames", "sampling", "stride", "expected"),
    [
        (16, 4, "uniform", 1, [2, 6, 10, 14]),
        (10, 4, "uniform", 1, [1, 3, 6, 8]),  # the middles are 1.25, 3.75, 6.25 and 8.75
        (4, 4, "uniform", 1, [0, 1, 2, 3]),
        (20, 4, "dense", 2, [6, 8, 10, 12]),
        (20, 4, "dense", 6, [0, 6, 12, 18]),
        (20, 4, "dense", 9, [0, 6, 12, 18]),  # 9 does not fit, and 7 would need 22 frames
        (5, 4, "dense", 2, [0, 1, 2, 3]),
        (9, 1, "dense", 4, [4]),
    ],
)
def test_middle_frames(count: int, frames: int, sampling: Sampling, stride: int, expected: list[int]) -> None:
    assert frame_indices(count, frames, sampling, stride) == expected


@pytest.mark.parametrize("sampling", ["uniform", "dense"])
def test_drawn_frames(sampling: Sampling) -> None:
    seen: list[set[int]] = [set() for _ in range(4)]
    for number in range(300):
        found = frame_indices(18, 4, sampling, 3, number)
        assert found == frame_indices(18, 4, sampling, 3, number)
        for k, index in enumerate(found):
            seen[k].add(index)
        if sampling == "dense":
            assert found == list(range(found[0], found[0] + 10, 3))
    if sampling == "uniform":  # parts of 4.5 frames
        assert seen == [set(range(5)), set(range(4, 9)), set(range(9, 14)), set(range(13, 18))]
    else:  # a stretch of 10 frames starts at 0 to 8
        assert seen == [set(range(3 * k, 3 * k + 9)) for k in range(4)]


# ---- their content


def picture(k: int) -> np.ndarray:
    """Frame k: a ramp across the width above a plain half whose value tells k."""
    image = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    image[:16] = np.arange(SIZE[0])[:, None] * 5
    image[16:] = 10 * k
    return image


def write_video(path: Path, codec: str = "ffv1", count: int = COUNT, frame: Callable[[int], Any] = picture) -> Path:
    """Encode frames; ffv1 keeps every pixel."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = SIZE
        stream.pix_fmt = {"ffv1": "bgr0", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for k in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(k), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("sampling", ["uniform", "dense"])
@pytest.mark.parametrize("number", [None, 3])
def test_clip_has_its_frames(sampling: Sampling, number: int | None, tmp_path: Path) -> None:
    clip = Clip(write_video(tmp_path / "a.mkv"), 4, sampling, 3)
    wanted = frame_indices(COUNT, 4, sampling, 3, number)
    for image, k in zip(clip.read(number), wanted, strict=True):
        assert np.array_equal(np.asarray(image), picture(k))


@pytest.mark.parametrize("name", ["a.mp4 libx264", "a.avi mpeg4", "a.AVI mjpeg", "a.mov libx264", "a.webm libvpx-vp9"])
def test_formats_of_the_benchmarks(name: str, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file, codec = name.split()
    if codec not in av.codecs_available:
        pytest.skip(f"av is built without {codec}")
    path = write_video(tmp_path / file.lower(), codec).rename(tmp_path / file)
    values = [np.asarray(image)[20:].mean() for image in Clip(path, COUNT).read()]
    assert np.abs(np.asarray(values) - 10 * np.arange(COUNT)).max() < 5  # lossy, and half a step


# ---- lists


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight videos whose halves tell their number, and lists in all forms."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for k in range(8):
        write_video(folder / f"video {k},a.mkv", frame=lambda _, k=k: picture(k))
    forms = ["video {0},a.mkv {1}", "video {0},a.mkv,{1}", "video {0},a.mkv  {1}", "{2}/video {0},a.mkv, {1}"]
    lines = [forms[k % 4].format(k, k % 2, folder) for k in range(8)]
    for name, part in (("train.csv", lines[:4]), ("val.csv", lines[4:6]), ("test.csv", lines[6:])):
        (tmp_path / name).write_text("\n".join(part) + "\n")
    return folder


def data(root: Path, **options: Any) -> VideoLists:
    lists = {split: root.parent / f"{split}.csv" for split in ("train", "val", "test")}
    given = {"frames": 4, "image_size": 16, "batch_size": 2, "normalization": "half"}
    return VideoLists(root, **(lists | given | options))


def test_batches_are_the_frames(root: Path) -> None:
    module = data(root)
    assert module.class_names == ["0", "1"]
    seen = []
    for split, files in (("val", [4, 5]), ("test", [6, 7])):
        for batch, labels in getattr(module, f"{split}_dataloader")():
            assert (batch.dtype, labels.tolist()) == (torch.float32, [0, 1])
            expected = [module.preprocess(Image.fromarray(picture(k))) for k in files]
            assert torch.equal(batch, torch.from_numpy(np.stack(expected))[:, None].expand(-1, 4, -1, -1, -1))
            seen += files
    assert seen == [4, 5, 6, 7]
    (_, labels), *_ = list(module.train_dataloader())
    assert len(labels) == 2
    assert "8 .mkv" not in str(module.account())
    assert "8 files in" in str(module.account())
    assert "= 4 train + 2 val + 2 test" in str(module.account())


def test_frames_are_changed_alike(root: Path) -> None:
    for augment in ("flip", Augment(erasing=1.0)):
        dataset = data(root, augment=augment, image_size=32).dataset("train")
        drawn = [dataset[0, number][0] for number in range(8)]
        assert all(torch.equal(clip, clip[:1].expand_as(clip)) for clip in drawn)
        kinds = {clip.numpy().tobytes() for clip in drawn}
        assert len(kinds) == 2 if augment == "flip" else len(kinds) > 4


def test_training_draws_frames_anew(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv")
    (tmp_path / "train.txt").write_text("a.mkv 0\n")
    dataset = VideoLists(tmp_path, tmp_path / "train.txt", frames=4, image_size=8).dataset("train")
    drawn = [dataset[0, number][0] for number in (1, 2, 1)]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(dataset[0][0], dataset[0][0])


def test_shots_and_hashes_of_videos(root: Path) -> None:
    module = data(root, shots=1)
    assert sorted(label for _, label in module.used("train")) == [0, 1]
    by, keys = module.dataset("val").image_keys()
    assert (by, len(keys.unique())) == ("content", 2)
    by, keys = module.dataset("val").image_keys("path")
    assert len(keys.unique()) == 2
    assert "= 2 train + 2 val + 2 test + 2 beyond the shots" in str(module.account())


# ---- what cannot be read


def broken(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    path = folder / ("x.mp4" if kind in ("cut", "damaged", "text") else "x.mkv")
    if kind == "short":
        return write_video(path, count=3)
    if kind == "text":
        path.write_text("no video")
    elif kind == "empty":
        path.touch()
    elif kind == "suffix":
        return write_video(path).rename(folder / "x.gif")
    elif kind == "cut":
        content = write_video(path, "libx264").read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "damaged":
        content = bytearray(write_video(path, "libx264").read_bytes())  # pictures first, then where each of them is
        start, end = content.find(b"mdat") + 16, content.find(b"moov") - 4
        content[start:end] = bytes(end - start)
        path.write_bytes(content)
    elif kind in ("long", "large"):
        write_video(path)
        if kind == "long":
            patch.setattr(clips, "MAX_FRAMES", COUNT - 1)
        else:
            patch.setattr(clips, "BUDGET", Budget(17 * SIZE[0] * SIZE[1]))
    elif kind == "folder":
        path.mkdir()
    return path


REASONS = {
    "short": "it has 3 frames, fewer than the 4 of a clip",
    "text": "Invalid data found when processing input",
    "empty": "Invalid data|End of file",
    "suffix": r"its name does not end in \.avi, \.mkv",
    "cut": "Invalid data|only|frames",
    "damaged": "Invalid data|only|frames",
    "long": "it has more than 19 frames; cut it into shorter ones",
    "large": "of memory are more than the limit",
    "folder": "Is a directory|not a regular file",
    "missing": "No such file",
}


@pytest.mark.parametrize("kind", REASONS)
def test_unreadable_video_is_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    path = broken(kind, tmp_path, monkeypatch)
    with pytest.raises(UnreadableImage) as error:
        Clip(path, 4).read()
    message = str(error.value)
    assert re.search(REASONS[kind], error.value.reason)
    if kind == "missing":
        assert message == f"video {path} does not exist; correct the path, or set on_error: skip"
    else:
        assert message.startswith(f"cannot read video {path}: {error.value.reason}")
        assert message.endswith("; repair it, remove it, or set on_error: skip")
    assert "\n" not in message


def test_unreadable_videos_are_counted(root: Path) -> None:
    (root / "video 1,a.mkv").write_bytes(b"")
    write_video(root / "video 6,a.mkv", count=2)
    (root / "video 0,a.mkv").unlink()
    module = data(root, on_error="skip")
    with pytest.warns(UserWarning, match="train: skipped 2 unreadable image"):
        assert len(module.dataset("train")) == 2
    with pytest.warns(UserWarning, match=r"test: skipped 1 .*6,a.mkv \(it has 2 frames, fewer than the 4 of a clip\)"):
        assert len(module.dataset("test")) == 1
    assert len(module.skipped) == 3
    assert "2 unreadable; 1 more are listed and missing" in str(module.account())
    report = verify(data(root))
    assert [split.unreadable for split in report.splits] == [2, 0, 1]
    with pytest.raises(ValueError, match=r"train.csv:1: image video 0,a.mkv does not exist"):
        data(root).dataset("train")


def test_paths_stay_in_the_root(root: Path) -> None:
    outside = write_video(root.parent / "b.mkv")
    (root / "link.mkv").symlink_to(outside)
    for path, words in (
        (f"{outside}", "leaves the folder"),
        ("../b.mkv", "leaves the folder"),
        ("link.mkv", "leads out of"),
    ):
        (root.parent / "test.csv").write_text(f"{path},0\n")
        with pytest.raises(ValueError, match=words):
            data(root).dataset("test")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": True}, "set cache: false"),
        ({"frames": 0}, "frames=0 must be at least 1"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"sampling": "random"}, "unknown sampling 'random'; choose from: uniform, dense"),
    ],
)
def test_wrong_settings(options: dict[str, Any], words: str, root: Path) -> None:
    with pytest.raises(ValueError, match=words):
        data(root, **options)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package av; install it by pip install 'dynadapter\[video\]'"):
        VideoLists(tmp_path)


# ---- the commands


CONFIGS = Path(__file__).parents[1] / "configs"


def test_commands_take_videos(root: Path, capsys: pytest.CaptureFixture) -> None:
    runs = root.parent / "runs"
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "frames": 4}
    places = {"data.root": root, "trainer.default_root_dir": runs, "data.classes": root.parent / "classes.txt"}
    places |= {f"data.{split}": root.parent / f"{split}.csv" for split in ("train", "val", "test")}
    places["data.classes"].write_text("odd\neven")
    small = ["--model.backbone=videomae_small_patch16_224", f"--model.backbone_args={sizes}", "--model.every=1"]
    small += ["--data.frames=4", "--data.batch_size=2", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    small += ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1"]
    given = [f"--{name}={place}" for name, place in places.items()]
    main(["fit", f"--config={CONFIGS / 'vtab.yaml'}", f"--config={CONFIGS / 'video.yaml'}", *small, *given])
    file = str(runs / "version_0" / "checkpoints" / "last.ckpt")
    kept = ExitClassifier.load_from_checkpoint(file, map_location="cpu").preprocessing
    assert (kept["image_size"], kept["resize"], kept["interpolation"]) == (16, "crop", "bilinear")
    main(["test", f"--ckpt_path={file}", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={runs}"])
    assert "Exits (test, shares under confidence_0.9)" in capsys.readouterr().out
    main(["report", str(runs / "version_0")])
    assert "the network is not measured: it takes clips of videos, no image files" in capsys.readouterr().out
    assert (runs / "version_0" / "report" / "report.html").is_file()
    bundle = root.parent / "bundle"
    main(["calibrate", f"--ckpt_path={file}", "--goal.cost=0.9", f"--bundle={bundle}", "--trainer.accelerator=cpu"])
    assert dynadapter.load(bundle).preprocess is None
    capsys.readouterr()
    photo = root.parent / "photo.png"
    Image.fromarray(picture(0)).save(photo)
    for network in (f"--ckpt_path={file}", f"--bundle={bundle}"):
        line = refused(["predict", network, f"--images={photo}", f"--out={root.parent / 'out.csv'}"], capsys)
        assert "takes clips of 4 frames, no image files; measure videos by dynadapter test" in line
