"""The model card of a bundle, ``README.md``: its content, its measurements, and how to use it."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dynadapter.backbones.availability import published
from dynadapter.backbones.packaged import find
from dynadapter.files import shown
from dynadapter.serve.bundle.config import MODEL, Config
from dynadapter.spec import plain

UNMEASURED = {
    "accuracy": "accuracy",
    "shares": "exit shares",
    "cost": "average cost of an image",
    "milliseconds": "time in milliseconds",
}
SHOWN_CLASSES = 20
PLAIN = re.compile(r"[\w ,.;%+()/='-]*")
"""What a name may hold to stand in the card as it is; ``:`` and ``@`` could begin a link."""
PLACE = "path/of/this/folder"
"""The bundle in the card's commands, until an upload puts the name of its repository there."""
LICENSES = ["apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "apple-ascl", "apple-amlr", "gemma"]
"""Licenses of timm's weights that the hub knows by this name; others are named beside ``other``."""


def card(config: Config, size: int) -> str:
    """Return the text of ``README.md``."""
    classes = config.class_names
    more = f", ... (all {len(classes)} in `config.json`)" if len(classes) > SHOWN_CLASSES else ""
    parts = [
        f"# {escape(config.backbone.name)} with {len(config.exit_depths)} exits, {len(classes)} classes",
        f"Classifies images into {len(classes)} classes: {', '.join(map(escape, classes[:SHOWN_CLASSES]))}{more}. Each "
        "image stops at the first exit that meets the exit policy, so that easy images cost less than hard ones.",
        _table(["part", ""], _parts(config, size)),
        "## Exits",
        _exits(config),
        "## Measured",
        *_measured(config),
        *_proof(config),
        "## Use",
        _use(config),
    ]
    return ModelCard("\n\n".join([f"---\n{_data(config).to_yaml()}\n---", *parts]) + "\n").content


def _data(config: Config) -> ModelCardData:
    """Return the metadata: the backbone, if timm names its weights, and the numbers of the bundle."""
    found = published(config.backbone.name) if config.backbone.origin == "pretrained" else None
    more: dict[str, Any] = {}
    if found is not None and found.license not in (None, "unknown"):
        known = found.license in LICENSES
        more = {"license": found.license} if known else {"license": "other", "license_name": found.license}
    if found is not None and found.repo is not None:
        more |= {"base_model": found.repo, "base_model_relation": "finetune" if config.whole else "adapter"}
    return ModelCardData(
        library_name="dynadapter",
        pipeline_tag="image-classification",
        tags=["early-exit", "timm", "dynadapter", *([type(config.adapter).__name__.lower()] if config.adapter else ())],
        model_name=f"{config.backbone.name} with {len(config.exit_depths)} exits",
        eval_results=list(_results(config)) or None,
        **more,
    )


def _results(config: Config) -> Iterable[EvalResult]:
    """Yield accuracy and cost under the exit policy for the model index of the hub, where they were measured."""
    measured = config.measured or {}
    images, split = measured.get("data", "not recorded"), measured.get("split")
    samples = measured.get("samples")
    for kind, title, unit in (
        ("accuracy", "accuracy", 1),
        ("balanced_accuracy", "balanced accuracy", 1),
        ("cost", "cost in % of static", 100),
    ):
        value = measured.get(kind)
        if isinstance(value, int | float) and math.isfinite(value):
            yield EvalResult(
                task_type="image-classification",
                dataset_type="unknown",
                dataset_name=shown(" ".join(str(images).split())),
                dataset_split={"val": "validation"}.get(split, split) if isinstance(split, str) else None,
                dataset_args={"samples": samples} if isinstance(samples, int) else None,
                metric_type=kind,
                metric_name=f"{title}, under {shown(config.policy.name)}",
                metric_value=round(unit * value, 6),
            )


def escape(text: str) -> str:
    """Return untrusted text for the card: unchanged, or as code if it could be a link, markup or a control character.

    >>> print(escape("wild bee"), escape("[a](http://b)"), escape("www.a.com"))
    wild bee `[a](http://b)` `www.a.com`
    """
    text = " ".join(text.split())
    return text if PLAIN.fullmatch(text) and "www." not in text.lower() else code(text)


def code(value: object) -> str:
    """Return a value as code on one line, in which nothing is a link or markup."""
    text = shown(value).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _parts(config: Config, size: int) -> Iterable[list[str]]:
    backbone = config.backbone
    arguments = dict(backbone.timm_args) | ({"image_size": backbone.image_size} if backbone.image_size else {})
    told = ", ".join(f"{name}={value}" for name, value in arguments.items()) or "timm's own arguments"
    kind = config.adapter.label if config.adapter else "no adapter"
    yield ["backbone", f"{code(backbone.name)}, frozen; {escape(told)}"]
    yield ["its weights", f"{_origin(config)}; fingerprint before adapters `{backbone.fingerprint[:12]}`"]
    yield ["adapter", f"{kind}{', merged into the backbone' if config.merged and config.adapter else ''}"]
    yield ["heads", code(config.heads)]
    if config.token_merging:
        yield ["token merging", code(config.token_merging)]
    yield ["policy", code(config.policy)]
    images = plain(config.preprocessing) if config.preprocessing else {}
    shown = ", ".join(f"{name} {value}" for name, value in images.items())
    yield ["images", shown or "preprocessed tensors; the preprocessing is not in this bundle"]
    tensors = "all tensors: no other file is needed" if config.whole else "trained tensors, without the backbone's"
    yield [f"`{MODEL}`", f"{size / 1e6:.2f} MB, {tensors}"]
    yield ["written by", ", ".join(f"{name} {version}" for name, version in config.versions.items())]


def _origin(config: Config) -> str:
    backbone = config.backbone
    if config.whole:
        return "in this bundle"
    if backbone.origin == "file":
        return f"a local file{f' ({code(backbone.file)})' if backbone.file else ''}, to be given when loading"
    if backbone.origin == "pretrained":
        return "those of timm" if find(backbone.name) is None else "those that ship with dynadapter"
    return f"drawn from seed {backbone.seed}, not pretrained"


def _exits(config: Config) -> str:
    """Return a table with a row for each exit: its depth, its cost, and its measurements."""
    numbers = range(1, len(config.exit_depths) + 1)
    columns = {"exit": list(map(str, numbers)), "after block": list(map(str, config.exit_depths))}
    if config.costs is not None:
        columns["GMACs"] = [f"{value:.3g}" for value in config.costs.gmacs]
        columns["% of static"] = [f"{value:.1%}" for value in config.costs.relative]
    for name, value in (config.measured or {}).items():
        if _is_by_exit(value, config):
            columns[_title(name)] = [_number(name, part) for part in value]
    table = _table(list(columns), zip(*columns.values(), strict=True))
    if config.costs is None:
        return f"{table}\n\nThe cost of the exits was not counted."
    adapters = "" if config.merged else " and adapters"
    return f"{table}\n\nGMACs: 10^9 multiply-adds for one image up to the exit, with all heads on the way{adapters}."


def _measured(config: Config) -> Iterable[str]:
    given = {name: value for name, value in (config.measured or {}).items() if value not in (None, [], ())}
    rows = [
        [_title(name), _number(name, value)]
        for name, value in given.items()
        if not _is_by_exit(value, config) and not isinstance(value, dict)
    ]
    if rows:
        yield _table([f"under {escape(config.policy.name)}", ""], rows)
    if missing := [words for name, words in UNMEASURED.items() if not {name, f"balanced_{name}"} & given.keys()]:
        yield f"Not measured: {', '.join(missing)}."
    if given and "data" not in given:
        yield "The data of these measurements are not recorded."


def _proof(config: Config) -> Iterable[str]:
    proof = config.proof
    if proof is not None:
        yield (
            f"The merged network was compared with the unmerged one on {proof.images} images: logits differ by at most "
            f"{proof.difference:.1e} of the largest (allowed: {proof.tolerance:.0e}), and under {escape(proof.policy)} "
            "all images stop at the same exits with the same classes."
        )
    elif config.merged and config.adapter:
        yield "The merged network was not compared with the unmerged one on images."


def _use(config: Config) -> str:
    arguments, options, comment = f'"{PLACE}"', "", ""
    if not config.whole and config.backbone.origin == "file":
        file = json.dumps(f"path/of/{config.backbone.file or 'backbone.safetensors'}")  # as a literal of Python, too
        arguments += f", weights={file}"
        options = " --weights BACKBONE_FILE"
    elif not config.whole and config.backbone.origin == "pretrained" and find(config.backbone.name) is None:
        comment = "  # fetches the backbone; offline: weights='path/of/its/file'"
    command = f"```bash\ndynadapter predict --bundle {PLACE}{options} --images my_photos --out labels.csv\n```\n\n"
    images, note = '["a.jpg", "b.jpg"]', ""
    if config.preprocessing is None:
        images, command = "images", ""
        note = "\n\n`images` are preprocessed tensors (batch, channels, height, width)."
    return (
        f"{command}```python\nfrom dynadapter import load\n\nbundle = load({arguments}){comment}\n"
        f"for label, confidence, exit_index in bundle.predict({images}):\n"
        f"    print(label, confidence, exit_index)  # exits count from 0\n```{note}"
    )


def _is_by_exit(value: Any, config: Config) -> bool:
    numbers = isinstance(value, list | tuple) and all(isinstance(part, int | float) for part in value)
    return numbers and len(value) == len(config.exit_depths)


def _title(name: str) -> str:
    return {"shares": "share of images", "cost": "% of static"}.get(name, escape(name.replace("_", " ")))


def _number(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if name in ("accuracy", "balanced_accuracy", "shares", "cost") else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_number(name, part) for part in value)
    return escape(str(value))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
