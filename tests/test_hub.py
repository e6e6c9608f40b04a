"""Bundles on the hub: pushed and used again through a stand-in of its API; refusals of one line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from commands import refused
from hub_stand_in import READER, WRITER, StandIn, point_to, serving
from huggingface_hub import ModelCard
from test_cli_predict import write_bundle, write_images

from dynadapter.backbones.availability import published
from dynadapter.calibrate import Outcome
from dynadapter.cli import main
from dynadapter.cli.policies import policy_from
from dynadapter.serve.bundle import BackboneSource, from_pretrained, load, push_to_hub
from dynadapter.serve.bundle.card import card

FILES = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 6)
    return write_images(root / "test", 9)


@pytest.fixture(scope="module")
def bundle(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    measured = {"data": "validation images", "split": "val", "accuracy": 0.9375, "cost": 0.613, "samples": 64}
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", images, measured=measured)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> StandIn:
    """A hub that knows the user ``me``, and an empty cache."""
    stand_in = StandIn()
    with serving(stand_in) as address:
        point_to(address, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield stand_in


def table(place: str, images: Path, out: Path) -> str:
    main(["predict", "--bundle", place, "--images", str(images), "--out", str(out)])
    return out.read_text()


def test_push_and_predict(hub, bundle, images, tmp_path, capsys, monkeypatch):
    (bundle / "private.txt").write_text("stays here")
    main(["push", "--bundle", str(bundle), "me/tiny"])
    printed = capsys.readouterr().out
    assert re.search(r"^the bundle is at http://\S+/me/tiny$", printed, re.MULTILINE)
    command = re.search(r"dynadapter (predict --bundle hf-hub:me/tiny) --images FOLDER", printed)
    assert command
    pushed = hub.repos["me/tiny"]["main"]
    assert {*pushed} == FILES | {".gitattributes"}
    assert all(pushed[name] == (bundle / name).read_bytes() for name in FILES - {"README.md"})
    assert f"dynadapter {command[1]}" in pushed["README.md"].decode()
    pushed |= {"setup.py": b"1/0", "more/config.json": b"{}"}
    monkeypatch.delenv("HF_TOKEN")  # a public repository
    assert table("hf-hub:me/tiny", images, tmp_path / "hub.csv") == table(str(bundle), images, tmp_path / "local.csv")
    assert {*hub.asked} == {"config.json", "model.safetensors"}


def test_commands_take_the_hub(hub, bundle, images, tmp_path, capsys, monkeypatch):
    push_to_hub(bundle, "me/tiny")
    data = ["--data=ImageFolder", f"--data.root={images.parent}"]
    printed = {}
    for place in ("hf-hub:me/tiny", str(bundle)):
        capsys.readouterr()
        main(["test", "--bundle", place, *data])
        printed[place] = capsys.readouterr().out
    assert printed["hf-hub:me/tiny"] == printed[str(bundle)]
    bench = ["--rounds=1", "--batch_sizes=[1]", "--arms=[merged]", f"--out={tmp_path}/bench.json"]
    main(["bench", "--bundle=hf-hub:me/tiny", *bench])
    assert policy_from("hf-hub:me/tiny").policy == load(bundle).policy

    def exported(net: object, out: str, **parts: object) -> None:
        raise ValueError(f"{parts['class_names']} would be exported")

    monkeypatch.setattr("dynadapter.serve.export.export_onnx", exported)
    assert "'bee, wild', 'cat') would" in refused(["export", "--bundle=hf-hub:me/tiny", f"--out={tmp_path}/e"], capsys)


def test_revision_and_private(hub, bundle, monkeypatch):
    address = push_to_hub(bundle, "me/tiny", private=True)
    assert address.endswith("/me/tiny")
    assert push_to_hub(bundle, "me/tiny", revision="v1", license="mit") == f"{address}/tree/v1"  # again, elsewhere
    assert {*hub.repos["me/tiny"]} == {"main", "v1"}
    readme = hub.repos["me/tiny"]["v1"]["README.md"].decode()
    assert 'load("hf-hub:me/tiny@v1")' in readme
    assert ModelCard(readme).data.license == "mit"
    assert from_pretrained("me/tiny", revision="v1").class_names == load("hf-hub:me/tiny@v1").class_names
    monkeypatch.delenv("HF_TOKEN")
    hub.asked.clear()
    with pytest.raises(ValueError, match=r"hf-hub:me/tiny@v2 .* no such repository, or it is private"):
        load("hf-hub:me/tiny@v2")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("me/tiny@v9", "it has no such revision"),
        ("me/resnet", "it is not a bundle"),
        ("me/none", "check the name"),
        ("tiny/a/b", "give OWNER/NAME"),
        ("", "give OWNER/NAME"),
    ],
)
def test_wrong_name_is_one_line(name, words, hub, bundle, images, tmp_path, capsys):
    push_to_hub(bundle, "me/tiny")
    hub.repos["me/resnet"] = {"main": {"config.json": b"{}", "pytorch_model.bin": b""}}
    args = ["predict", f"--bundle=hf-hub:{name}", f"--images={images}", f"--out={tmp_path}/c.csv"]
    line = refused(args, capsys)
    assert f"hf-hub:{name} " in line
    assert words in line


def test_offline_uses_the_cache(bundle, images, tmp_path, monkeypatch, capsys):
    with serving(StandIn()) as address:
        point_to(address, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        push_to_hub(bundle, "me/tiny")
        before = table("hf-hub:me/tiny", images, tmp_path / "a.csv")
    assert table("hf-hub:me/tiny", images, tmp_path / "b.csv") == before
    args = ["predict", "--bundle=hf-hub:me/other", f"--images={images}", f"--out={tmp_path}/c.csv"]
    for way in ("the hub does not answer", "HF_HUB_OFFLINE is set"):
        line = refused(args, capsys)
        assert "the bundle hf-hub:me/other could not be fetched" in line
        assert way in line
        assert "only bundles in the cache can be used; check the network" in line
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(["push", "me/tiny", "--bundle", str(bundle)], capsys)


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, "me/tiny", "log in by hf auth login, or set HF_TOKEN"),
        (READER, "me/tiny", "a token with write access"),
        (WRITER, "you/tiny", "give your own name as OWNER"),
        (WRITER, "me/resnet", "another model (pytorch_model.bin); give another name"),
        (WRITER, "me/bert", "another model (config.json, model.safetensors)"),
        (WRITER, "tiny", "give OWNER/NAME"),
        (WRITER, "hf-hub:me/tiny", "give OWNER/NAME"),
        (WRITER, "me/ti ny", "give OWNER/NAME"),
    ],
)
def test_push_is_refused(token, name, words, hub, bundle, monkeypatch, capsys):
    hub.repos["me/resnet"] = {"main": {"pytorch_model.bin": b"", "README.md": b""}}
    hub.repos["me/bert"] = {"main": {"config.json": b'{"architectures": ["Bert"]}', "model.safetensors": b""}}
    before = json.dumps(hub.repos, default=str)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    line = refused(["push", name, "--bundle", str(bundle)], capsys)
    assert words in line
    assert repr(name) in line
    assert json.dumps(hub.repos, default=str) == before


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "README.md", "all"])
def test_damaged_bundle_is_not_pushed(damage, hub, bundle, tmp_path, capsys):
    place = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    shutil.rmtree(place) if damage == "all" else (place / damage).unlink()
    assert str(place) in refused(["push", "me/tiny", "--bundle", str(place)], capsys)
    if damage != "all":
        (place / damage).write_bytes(b"\xff")
        assert str(place) in refused(["push", "me/tiny", "--bundle", str(place)], capsys)
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": {"name": "hf-hub:evil/x"}}, "hf-hub:evil/x"),
        ({"backbone": {"timm_args": {"checkpoint_path": "evil.pth"}}}, "checkpoint_path"),
        ({"heads": {"class_path": "os.system", "init_args": {}}}, "os.system"),
        ({"library": "other"}, "does not belong to a bundle"),
    ],
)
def test_hub_is_not_trusted(change, words, hub, bundle):
    push_to_hub(bundle, "me/tiny")
    files = hub.repos["me/tiny"]["main"]
    config = json.loads(files["config.json"])
    del config["checksum"]
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) and key == "backbone" else value
    files["config.json"] = json.dumps(config).encode()
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        load("hf-hub:me/tiny")
    assert "cache" not in str(refused.value)


# ---- the card


def test_card_has_the_bundles_numbers(bundle):
    loaded = ModelCard.load(bundle / "README.md")
    data = loaded.data
    assert (data.library_name, data.pipeline_tag) == ("dynadapter", "image-classification")
    assert {"early-exit", "timm", "lora"} <= {*data.tags}
    assert not hasattr(data, "license") or data.license is None  # the backbone is drawn from a seed
    accuracy, cost = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.9375)
    assert (cost.metric_type, cost.metric_value) == ("cost", 61.3)
    assert "confidence" in accuracy.metric_name.lower()
    for result in (accuracy, cost):
        assert (result.dataset_name, result.dataset_split) == ("validation images", "validation")
        assert result.dataset_args == {"samples": 64}
    assert "% of static" in cost.metric_name
    assert "dynadapter predict --bundle path/of/this/folder" in loaded.text


@pytest.mark.parametrize(
    "measured", [None, {}, Outcome(float("nan"), float("nan"), (0.5, 0.5), 4), {"accuracy": "all"}]
)
def test_card_without_numbers_has_no_index(measured, bundle):
    found = load(bundle).config
    config = replace(found, measured=measured if not isinstance(measured, Outcome) else vars(measured))
    assert ModelCard(card(config, 1)).data.eval_results is None


@pytest.mark.parametrize(
    ("name", "origin", "license", "base"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "pretrained", "apache-2.0", "timm/vit_tiny_patch16_224.augreg_in21k"),
        ("vit_small_patch16_dinov3.lvd1689m", "pretrained", "other", "timm/vit_small_patch16_dinov3.lvd1689m"),
        ("micro", "pretrained", "apache-2.0", None),
        ("vit_tiny_patch16_224.augreg_in21k", "file", None, None),
        ("vit_tiny_patch16_224.augreg_in21k", "seed", None, None),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_card_names_the_base_model(name, origin, license, base, whole, bundle):
    source = BackboneSource(name, "0" * 64, origin)
    data = ModelCard(card(replace(load(bundle).config, backbone=source, whole=whole), 1)).data.to_dict()
    assert data.get("license") == license
    assert data.get("license_name") == (published(name).license if license == "other" else None)
    assert data.get("base_model") == base
    assert data.get("base_model_relation") == (None if base is None else "finetune" if whole else "adapter")
