"""``dynadapter report``: its numbers, its figures and its page."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused
from PIL import Image

from dynadapter import AtExit, Combined, Confidence
from dynadapter.calibrate.stored import calibration_path
from dynadapter.cli import main, report
from dynadapter.cli.policies import policy_from
from dynadapter.cli.report import find_run, measure, other_data, read_run
from dynadapter.files import sha256
from dynadapter.report import Measured, Run, confusion, figures_of, on_one_scale, recall, reliability, run_page
from dynadapter.report.figures import compared, mixtures, png
from dynadapter.report.page import result
from dynadapter.spec import plain
from dynadapter.training.restoring import load_classifier

FIT = [
    "fit",
    "--model.backbone=vit_tiny_patch16_224",
    "--model.pretrained=false",
    "--model.backbone_args={patch_size: 8, embed_dim: 24, depth: 4, num_heads: 3}",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--data=ImageFolder",
    "--data.image_size=32",
    "--data.batch_size=8",
]
OPTIONS = SimpleNamespace(split="val", weights=None, pretrained=None, device="cpu", data={})
NAMES = ("<script>alert(1)</script>", "café 猫")


def fit(root: Path, *more: str) -> Path:
    """Train, and return the folder of the run."""
    main(
        [*FIT, f"--data.root={root / 'images'}", f"--trainer.default_root_dir={root}", "--trainer.max_epochs=2", *more]
    )
    return max(root.glob("version_*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run in it, ``version_0``."""
    root = tmp_path_factory.mktemp("report")
    for label, name in enumerate(("one", "two")):
        for split, count in (("train", 12), ("val", 9), ("test", 5)):
            place = root / "images" / split / name
            place.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (20, 24), (200 * label, 20 * k, 60)).save(place / f"{k}.png")
    fit(root, "--model.every=1")
    return root


@pytest.fixture
def run(folder, tmp_path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(folder / "version_0", tmp_path / "version_0"))


class Page(HTMLParser):
    """The parts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            assert dict(attrs)["alt"]
            self.images.append(dict(attrs)["src"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th") and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def page_of(run: Path) -> Page:
    return Page((run / "report" / "report.html").read_text(encoding="utf-8"))


def last_values(run: Path) -> dict[str, float]:
    with (run / "metrics.csv").open() as file:
        return {key: float(value) for line in csv.DictReader(file) for key, value in line.items() if value}


def simple(exits: int = 3, images: int = 40, classes: int = 4, policy=None, names=None) -> Measured:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(exits, images, classes, generator=generator)
    logits[:, torch.arange(images), targets] += torch.linspace(0.5, 2, exits)[:, None]
    costs = tuple(np.linspace(0.3, 1.05, exits).tolist()) if exits > 1 else (1.0,)
    pictures = [Image.new("RGB", (9, 5), (k % 256, 0, 0)) for k in range(images)]
    names = tuple(names or (f"class {k}" for k in range(classes)))
    policy = policy or Confidence(0.6)
    return Measured(
        "val", logits, targets, costs, policy, "as given", names, pictures, tuple(range(1, exits + 1)), 7, 1.0
    )


# ---- numbers


def test_numbers_are_those_of_the_training(folder):
    found, why = measure(find_run(str(folder / "version_0")), OPTIONS)
    assert not why
    logged = last_values(folder / "version_0")
    for k in range(4):
        assert found.accuracies[k] == pytest.approx(logged[f"val/acc_exit{k + 1}"], abs=1e-6)
        error = reliability(found.logits[k], found.targets).error
        assert error == pytest.approx(logged[f"val/ece_exit{k + 1}"], abs=1e-6)
        assert found.shares[k] == pytest.approx(logged[f"val/confidence_0.9/share_exit{k + 1}"], abs=1e-6)
    assert found.accuracy == pytest.approx(logged["val/confidence_0.9/acc"], abs=1e-6)
    assert found.exit_depths == (1, 2, 3, 4)


@pytest.mark.parametrize("policy", [Confidence(0.6), AtExit(1), Combined(Confidence(0.5), "geometric")])
def test_counts_equal_a_loop(policy):
    one = simple(policy=policy)
    one.logits[0, 3] = torch.nan
    for predicted in (*one.predictions, one.predicted):
        counts, right, seen = np.zeros((4, 4), int), np.zeros(4), np.zeros(4)
        for guess, target in zip(predicted.tolist(), one.targets.tolist(), strict=True):
            seen[target] += 1
            right[target] += guess == target
            if guess >= 0:
                counts[target, guess] += 1
        assert (confusion(predicted, one.targets, 4) == counts).all()
        assert recall(predicted, one.targets, 4) == pytest.approx(right / seen)
    assert one.predictions[0, 3] == -1
    assert one.cost == pytest.approx(sum(one.costs[k] for k in one.routed.exit_index.tolist()) / 40)


def test_recall_of_an_absent_class_is_nan():
    values = recall(torch.tensor([0, 1]), torch.tensor([0, 0]), 3)
    assert values[0] == 0.5
    assert np.isnan(values[1:]).all()


def test_reliability_equals_a_loop():
    one = simple()
    found = reliability(one.logits[2], one.targets)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, target in zip(one.logits[2].double(), one.targets.tolist(), strict=True):
        top = row.softmax(0).max().item()
        bins.setdefault(min(int(top * 15), 14), []).append((top, row.argmax().item() == target))
    for place, members in bins.items():
        assert found.counts[place] == len(members)
        assert found.confidence[place] == pytest.approx(sum(top for top, _ in members) / len(members))
        assert found.accuracy[place] == pytest.approx(sum(right for _, right in members) / len(members))
    gaps = [abs(sum(right - top for top, right in members)) for members in bins.values()]
    assert found.error == pytest.approx(sum(gaps) / 40)


def test_mixtures_are_the_best_of_two_exits():
    generator = np.random.default_rng(0)
    for _ in range(20):
        costs, accuracies = tuple(np.sort(generator.random(5)).tolist()), generator.random(5).tolist()
        hull = mixtures(costs, accuracies)
        for cost in np.linspace(costs[0], costs[-1], 9):
            best = max(
                accuracies[i] + (accuracies[j] - accuracies[i]) * (cost - costs[i]) / (costs[j] - costs[i])
                for i in range(5)
                for j in range(5)
                if costs[i] <= cost <= costs[j] and i != j
            )
            assert np.interp(cost, *zip(*hull, strict=True)) == pytest.approx(best)
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(hull)]
        assert slopes == sorted(slopes, reverse=True)


# ---- the page


def test_page_is_whole_and_alone(run, capsys):
    main(["report", str(run)])
    assert f"the report is in {run / 'report' / 'report.html'}" in capsys.readouterr().out
    page = page_of(run)
    assert len(page.images) == 7
    assert not {"script", "link", "iframe"} & set(page.tags)
    for source in page.images:
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        Image.open(io.BytesIO(data)).verify()
    assert {path.stem for path in (run / "report").glob("*.png")} == {
        *("learning", "cost", "shares", "images", "confusion", "recall", "reliability")
    }
    logged = last_values(run)
    exits = [row for row in page.rows if row and row[0].startswith("exit ")]
    assert [row[2] for row in exits[:4]] == [f"{logged[f'val/acc_exit{k}']:.1%}" for k in range(1, 5)]
    main(["report", str(run / "checkpoints" / "last.ckpt")])  # again, by its checkpoint


def with_dirpath(run: Path) -> Path:
    """Turn a run into one with ``checkpoint.dirpath``; return that folder."""
    folder = (run / "checkpoints").rename(run.parent / "own")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("dirpath: null", f"dirpath: {folder}"))
    return folder


def test_calibrated_checkpoint_is_measured(run):
    """The checkpoint whose policy ``--policy_from RUN`` takes: of several the last, of a changed one none."""
    saved = run / "checkpoints"
    assert find_run(str(run)).checkpoint == saved / "last.ckpt"
    for number, name in enumerate(("weights", "last", "weights")):
        checkpoint = saved / f"{name}.ckpt"
        stored = {
            "policy": plain(Confidence(0.6 + number / 10)),
            "costs": {"exit_depths": [1, 2, 3, 4]},
            "class_names": ["one", "two"],
            "backbone_hash": "0",
            "checkpoint_sha256": sha256(checkpoint),
        }
        calibration_path(checkpoint).write_text(json.dumps(stored))
        os.utime(calibration_path(checkpoint), (number, number))
        measured, _ = measure(find_run(str(run)), OPTIONS)
        assert find_run(str(run)).checkpoint == checkpoint
        assert measured.policy == policy_from(str(run)).policy
        assert measured.origin.startswith("calibrated: ")
        assert result(measured).endswith(
            "These images may have chosen the policy: quote the cross-fitted accuracy of calibrate."
        )
    saved = with_dirpath(run)
    assert find_run(str(run)).checkpoint == saved / "weights.ckpt"
    assert policy_from(str(run)).policy == measured.policy
    shutil.copyfile(saved / "last.ckpt", saved / "weights.ckpt")
    assert find_run(str(run)).checkpoint == saved / "last.ckpt"
    for file in saved.glob("*.calibration.json"):
        file.write_text("{")
    assert find_run(str(run)).checkpoint == saved / "last.ckpt"


def test_checkpoint_of_any_name_is_measured(run):
    saved = run / "checkpoints"
    (saved / "weights.ckpt").unlink()
    for epoch in range(2):
        shutil.copyfile(saved / "last.ckpt", saved / f"epoch={epoch}.ckpt")
        os.utime(saved / f"epoch={epoch}.ckpt", (epoch, epoch))
    (saved / "last.ckpt").unlink()
    assert find_run(str(run)).checkpoint == saved / "epoch=1.ckpt"
    saved = with_dirpath(run)
    assert find_run(str(run)).checkpoint == saved / "epoch=1.ckpt"
    (run / "config.yaml").write_text("{")
    assert find_run(str(run)).checkpoint is None


def test_test_images_are_measured_on_request(run, folder, capsys):
    main(["report", str(run), "--split=test", "--out", str(run / "tested")])
    assert "10 test images" in (run / "tested" / "report.html").read_text()
    main(["report", str(run), "--data.root", str(folder / "images"), "--data.batch_size", "3"])
    page = (run / "report" / "report.html").read_bytes()
    error = refused(["report", run, "--split=test", "--data.root=elsewhere"], capsys)
    assert "the network is not measured: " in error
    assert (run / "report" / "report.html").read_bytes() == page


def test_text_of_files_is_escaped():
    record = {"command_line": "dynadapter fit <b>", "data": {"splits": {"<i>": {"images": "<u>"}}}, "machine": 3}
    one = simple(classes=2, names=NAMES)
    text = run_page(Run("<img src=x>", record, "a: <b>"), one, {}, ["<s>"])
    assert not {"script", "b", "i", "u", "s", "img"} & set(Page(text).tags)
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize(("exits", "classes"), [(1, 2), (2, 30), (9, 200)])
def test_figures_of_any_size_are_drawn(exits, classes):
    one = simple(exits, 60, classes, names=[*NAMES, *(f"class $x_{k}^ {'long ' * 9}" for k in range(classes - 2))])
    figures = figures_of(Run("r"), one)
    assert set(figures) == {"confusion", "recall", "reliability", "images"} | (
        {"cost", "shares"} if exits > 1 else set()
    )
    for figure in figures.values():
        image = Image.open(io.BytesIO(png(figure)))
        assert min(image.size) > 100
        assert image.width < 1600


@pytest.mark.parametrize(
    ("origin", "label"), [("the training's", "the training's"), ("calibrated: a.json", "calibrated")]
)
def test_figures_of_a_perfect_run(origin, label):
    """Axes of accuracy end just above 100 %, and no marker there is cut."""
    one = replace(simple(), logits=torch.eye(4)[simple().targets].mul(50).repeat(3, 1, 1), origin=origin)
    lines: Any = [{"epoch": "0", "val/acc_exit1": "1.0"}]
    figures = figures_of(Run("r", lines=lines), one) | {"compared": compared([("r", one)])}
    for name, place in (("cost", 0), ("compared", 0), ("learning", 1)):
        axes = figures[name].axes[place]
        png(figures[name])  # lays it out
        assert 1 < axes.get_ylim()[1] < 1.01
        assert max(tick for tick in axes.get_yticks() if tick <= axes.get_ylim()[1]) <= 1 + 1e-9
        above = axes.transData.transform((0, axes.get_ylim()[1]))[1] - axes.transData.transform((0, 1))[1]
        assert above > max(line.get_markersize() for line in axes.lines) / 2 * figures[name].dpi / 72 * 0.8
    assert f"{label} policy: 100.0% at 30.0%" in [line.get_label() for line in figures["cost"].axes[0].lines]
    assert not any(bubbles.get_clip_on() for axes in figures["reliability"].axes for bubbles in axes.collections)


def test_what_is_missing_is_said(run, capsys):
    shutil.rmtree(run / "checkpoints")
    main(["report", str(run)])
    assert "the network is not measured: the run saved no checkpoint" in capsys.readouterr().out
    assert len(page_of(run).images) == 1
    (run / "metrics.csv").unlink()
    (run / "run.json").write_text("[3]")
    main(["report", str(run)])
    assert "there are no learning curves: metrics.csv is missing" in capsys.readouterr().out
    assert page_of(run).images == []


def test_network_that_fails_is_one_line(run, monkeypatch, capsys):
    main(["report", str(run)])
    assert (run / "report" / "cost.png").exists()

    def broken(*_):
        raise RuntimeError("out of memory\nTraceback")

    monkeypatch.setattr("dynadapter.cli.networks.stacked", broken)
    main(["report", str(run)])
    assert "the network is not measured: out of memory" in capsys.readouterr().out
    assert {path.name for path in (run / "report").iterdir()} == {"report.html", "learning.png"}


def test_images_may_be_gone(folder, run, capsys):
    main(["report", str(run), "--data.root", str(run)])
    assert re.search(r"not measured: .*train/CLASS/image.png", capsys.readouterr().out)
    assert len(page_of(run).images) == 1


@pytest.mark.parametrize(
    "text",
    ["", "epoch,step\n", "epoch,val/acc_exit1,train/loss\n0,nan,inf\nx,0.5,0.2\n1,0.5,", "\x00", "a" * 200_000 + "\n"],
)
def test_damaged_metrics_are_left_out(run, text):
    (run / "metrics.csv").write_text(text)
    found = read_run(run)
    figures_of(found, None)
    assert found.series("val/acc_exit1")[1] in ([], [0.5])
    assert run_page(found, None, {}).endswith("</html>\n")


def test_dates_of_two_kinds_give_no_time():
    assert Run("a", {"started": "2026-01-01T00:00:00", "ended": "2026-01-01T00:01:00+00:00"}).seconds is None
    assert Run("a", {"started": "2026-01-01T00:00:00", "ended": "2026-01-01T00:01:00"}).seconds == 60


def test_series_have_the_steps_of_an_epoch():
    lines = [{"epoch": "0", "train/loss": "3"}, {"epoch": "0", "train/loss": "2"}, {"epoch": "1", "train/loss": "1"}]
    assert Run("r", lines=lines).series("train/loss") == ([0.5, 1.0, 2.0], [3, 2, 1])


# ---- several runs


def test_runs_are_compared(folder, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    static = fit(folder, "--model.exit_depths=[]", "--exit_weights=null")
    main(["report", str(run), str(static)])
    assert "measured on other" not in capsys.readouterr().out
    page = Page(Path("report.html").read_text())
    assert len(page.images) == 1
    [head, first, second] = page.rows
    logged = last_values(run)
    assert head[1:5] == ["exit 1 (val)", "exit 2 (val)", "exit 3 (val)", "exit 4 (val)"]
    assert first[1] == f"{logged['val/acc_exit1']:.1%}"
    assert first[5] == "confidence_0.9"
    assert second[1:4] == ["", "", ""]
    assert second[4] == f"{last_values(static)['val/acc_exit1']:.1%}"
    for row, place in ((first, run), (second, static)):
        net = load_classifier(place / "checkpoints" / "last.ckpt").net
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        assert row[head.index("trained parameters")] == f"{trained:,}" != "0"
    (tmp_path / "version_1").mkdir()
    (tmp_path / "version_1" / "run.json").write_text("{}")
    main(["report", str(run), "version_1"])  # replaces the page
    assert "version_1 is not measured: the run saved no checkpoint" in capsys.readouterr().out


def test_runs_on_other_data_are_noted(folder, run, tmp_path, monkeypatch, capsys):
    one, other = simple(), replace(simple(), sources=simple().sources[::-1])
    for what, second in (("classes", replace(other, class_names=tuple("abcd"))), ("images", other)):
        [note] = other_data([("first", one), ("same", simple()), ("second", second)])
        assert note == f"second was measured on other {what} than first: do not compare their accuracies"
    root, images = shutil.copytree(folder / "images", tmp_path / "images"), report.images
    Image.new("RGB", (20, 24), "white").save(root / "val" / "one" / "3.png")
    monkeypatch.setattr(
        report, "images", lambda file, _: images(file, {"root": str(root)} if run in file.parents else {})
    )
    monkeypatch.chdir(tmp_path)
    main(["report", str(folder / "version_0"), str(run)])
    words = f"{run} was measured on other images than {folder / 'version_0'}"
    assert words in capsys.readouterr().out
    assert words in Path("report.html").read_text()


def test_costs_are_relative_to_one_network():
    known: Any = [(Run(name, {}, "", []), replace(simple(), static_gmacs=size)) for name, size in (("a", 1), ("b", 4))]
    runs, notes = on_one_scale([*known, (Run("c", {}, "", []), None)])
    assert notes == ["costs are in % of the static network of b: 4 GMACs"]
    assert [one and one.cost for _, one in runs] == [pytest.approx(known[0][1].cost / 4), known[1][1].cost, None]
    assert on_one_scale(known[:1]) == (known[:1], [])


# ---- what is refused

MISTAKES = [
    (["no"], "no does not exist; give the folder of a run"),
    (["empty"], "empty is not the folder of a run; give one that fit wrote"),
    (["{R}", "--out={R}/run.json"], "is not a folder; give another --out"),
    (["{R}", "{R}", "--out={R}/run.json"], "run.json exists and is not a report; give another --out"),
    (["{R}", "--split=train"], "split"),
    (["{R}", "--spilt=val"], "did you mean 'split'?"),
]


@pytest.mark.parametrize(("args", "words"), MISTAKES)
def test_mistakes_are_one_line(args, words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    before = (run / "run.json").read_bytes()
    assert words in refused(["report", *(arg.replace("{R}", str(run)) for arg in args)], capsys)
    assert (run / "run.json").read_bytes() == before


# ---- TensorBoard


def test_figures_go_to_tensorboard(run, monkeypatch, capsys):
    added = []

    class Writer:
        def __init__(self, folder):
            added.append(folder)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            added.append("closed")

        def add_figure(self, name, figure, step, close):
            added.append((name, step))

    (run / "events.out.tfevents.1").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    main(["report", str(run)])
    assert "pip install 'dynadapter[tensorboard]'" in capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    main(["report", str(run)])
    assert added[0] == str(run)
    assert ("report/cost", 2) in added
    assert added[-1] == "closed"


# ---- a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_browser_shows_every_image(run, tmp_path):
    main(["report", str(run)])
    text = (run / "report" / "report.html").read_text()
    script = (
        "<script>onload = () => {document.title = JSON.stringify("
        "[...document.images].map(i => i.complete && i.naturalWidth > 0))}</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{script}</body>"))
    line = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]
    dom = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search("<title>(.*?)</title>", dom)
    assert found
    assert json.loads(found[1]) == [True] * 7
