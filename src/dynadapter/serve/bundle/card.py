"""The card of a bundle: what it is, what was measured and what was not, and how to use it."""

from collections.abc import Iterable, Sequence
from typing import Any

from dynadapter.backbones.packaged import find
from dynadapter.serve.bundle.config import MODEL, Config
from dynadapter.spec import plain

_UNMEASURED = {
    "accuracy": "accuracy",
    "shares": "how many images leave at each exit",
    "cost": "the average cost of an image",
    "milliseconds": "time in milliseconds",
}
_SHOWN_CLASSES = 20


def card(config: Config, size: int) -> str:
    """Writes ``README.md``.

    Args:
        config: All that the bundle says.
        size: Bytes of ``model.safetensors``.
    """
    backbone, classes = config.backbone, config.class_names
    kind = type(config.adapter).__name__ if config.adapter else "no adapter"
    front = ["library_name: dynadapter", "pipeline_tag: image-classification", "tags: [early-exit, timm, dynadapter]"]
    shown = ", ".join(map(_escaped, classes[:_SHOWN_CLASSES]))
    more = f", ... (all {len(classes)} in `config.json`)" if len(classes) > _SHOWN_CLASSES else ""
    merged = ", merged into the backbone" if config.merged and config.adapter else ""
    tensors = (
        "all tensors: no other file is needed"
        if config.whole
        else "adapters, early heads and classifier; the backbone is not in it"
    )
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {_escaped(backbone.name)} with {len(config.exit_depths)} exits, {len(classes)} classes",
        f"Tells images of {len(classes)} classes apart: {shown}{more}. Each image leaves the network at the first exit "
        "that is sure of it, so that easy images cost less than hard ones.",
        _table(
            ["part", ""],
            [
                ["backbone", f"`{backbone.name}`, frozen; {_arguments(backbone.timm_args, backbone.image_size)}"],
                ["its weights", f"{_origin(config)}; fingerprint before adapters `{backbone.fingerprint[:12]}`"],
                ["adapter", f"{kind}{merged}"],
                ["heads", _spec(config.heads)],
                *([["like tokens", f"merged: {_spec(config.token_merging)}"]] if config.token_merging else []),
                ["policy", _spec(config.policy)],
                ["images", _preprocessing(config)],
                [f"`{MODEL}`", f"{size / 1e6:.2f} MB, {tensors}"],
                ["written by", ", ".join(f"{name} {version}" for name, version in config.versions.items())],
            ],
        ),
        "## Exits",
        _exits(config),
        "## Measured",
        *_measured(config),
        *_proof(config),
        "## Use",
        _use(config),
    ]
    return "\n\n".join(parts) + "\n"


def _exits(config: Config) -> str:
    """A row for each exit: its place, its cost, and whatever was measured exit by exit."""
    titles, columns = (
        ["exit", "after block"],
        [[str(k + 1) for k in range(len(config.exit_depths))], list(map(str, config.exit_depths))],
    )
    if config.costs is not None:
        titles += ["GMACs", "of the backbone"]
        columns += [[f"{v:.3g}" for v in config.costs.gmacs], [f"{v:.1%}" for v in config.costs.relative]]
    for name, value in (config.measured or {}).items():
        if _by_exit(value, config):
            titles.append(_title(name))
            columns.append([_number(name, part) for part in value])
    table = _table(titles, zip(*columns, strict=True))
    if config.costs is None:
        return f"{table}\n\nThe cost of the exits was not counted."
    return (
        f"{table}\n\nGMACs: 10^9 multiply-adds for one image up to the exit, with all heads on the way"
        f"{'' if config.merged else ' and adapters'}."
    )


def _measured(config: Config) -> list[str]:
    """What is known, and then what is not."""
    given = {name: value for name, value in (config.measured or {}).items() if value not in (None, [], ())}
    rows = [
        [_title(name), _number(name, value)]
        for name, value in given.items()
        if not _by_exit(value, config) and not isinstance(value, dict)
    ]
    parts = [_table([f"under {_escaped(config.policy.name)}", ""], rows)] if rows else []
    missing = [words for name, words in _UNMEASURED.items() if name not in given]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    if given and "data" not in given:
        parts.append("On which data this was measured is not recorded.")
    return parts


def _proof(config: Config) -> list[str]:
    proof = config.proof
    if proof is not None:
        return [
            f"The merged network was compared with the unmerged one on {proof.images} images: logits differ by at most "
            f"{proof.difference:.1e} of the largest (allowed: {proof.tolerance:.0e}), and under "
            f"{_escaped(proof.policy)} all images leave at the same exits with the same classes."
        ]
    if config.merged and config.adapter:
        return ["The merged network was not compared with the unmerged one on images."]
    return []


def _use(config: Config) -> str:
    if config.whole or config.backbone.origin == "seed":
        call, comment = 'load("path/of/this/folder")', ""
    elif config.backbone.origin == "file":
        file = config.backbone.file or "backbone.safetensors"
        call, comment = f'load("path/of/this/folder", weights="path/of/{file}")', ""
    else:
        call = 'load("path/of/this/folder")'
        fetched = find(config.backbone.name) is None
        comment = "  # fetches the backbone; offline: weights='path/of/its/file'" if fetched else ""
    images = '["a.jpg", "b.jpg"]' if config.preprocessing else "images"
    note = (
        ""
        if config.preprocessing
        else "\n\n`images` are preprocessed tensors (batch, channels, height, width); this bundle does not say how."
    )
    return (
        f"```python\nfrom dynadapter import load\n\nbundle = {call}{comment}\n"
        f"for label, confidence, exit in bundle.predict({images}):\n"
        f"    print(label, confidence, exit)  # exits count from 0\n```{note}"
    )


def _origin(config: Config) -> str:
    backbone = config.backbone
    if config.whole:
        return "in this bundle"
    if backbone.origin == "file":
        return f"a local file{f' (`{backbone.file}`)' if backbone.file else ''}, to be given when loading"
    if backbone.origin == "pretrained":
        return "those of timm" if find(backbone.name) is None else "those that ship with dynadapter"
    return f"drawn from seed {backbone.seed}, not pretrained"


def _arguments(arguments: dict[str, Any], image_size: int | None) -> str:
    given = dict(arguments) | ({"image_size": image_size} if image_size else {})
    return ", ".join(f"{name}={value}" for name, value in given.items()) or "timm's own arguments"


def _preprocessing(config: Config) -> str:
    if config.preprocessing is None:
        return "taken as tensors; the preprocessing is not in this bundle"
    return ", ".join(f"{name} {value}" for name, value in plain(config.preprocessing).items())


def _spec(spec: Any) -> str:
    """Writes a configuration object as one would in Python, in code quotes."""
    return f"`{spec}`"


def _by_exit(value: Any, config: Config) -> bool:
    numbers = isinstance(value, list | tuple) and all(isinstance(part, int | float) for part in value)
    return numbers and len(value) == len(config.exit_depths)


def _title(name: str) -> str:
    return {"shares": "share of images", "cost": "cost, of the backbone"}.get(name, _escaped(name.replace("_", " ")))


def _number(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if name in ("accuracy", "shares", "cost") else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_number(name, part) for part in value)
    return _escaped(str(value))


def _escaped(text: str) -> str:
    """Keeps a name from ending its cell or line."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
