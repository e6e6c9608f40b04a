"""The report as one HTML page that needs no other file."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape

from dynadapter.report.measured import Measured, recall
from dynadapter.report.run import Run

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #17181a; --soft: #a5a5a5; --line: #3a3b3d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.result { font-size: 1.1rem; } p.note { color: var(--soft); }
figure { margin: .8rem 0; } figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
table.pairs td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
table.pairs td:first-child { white-space: nowrap; }
div.wide { overflow-x: auto; }
pre { overflow-x: auto; font-size: .82rem; border: 1px solid var(--line); padding: .8rem; }
@media print { body { max-width: none; margin: 0; }
               details::details-content { content-visibility: visible; } figure { break-inside: avoid; } }
"""
CAPTIONS = {
    "learning": ("Training", "Losses and validation accuracy of each exit by its own logits, over epochs."),
    "cost": (
        "Accuracy over cost",
        "Each threshold of the confidence gives one point of the blue line. The dashed line is what sending images to "
        "exits at random gives at the same cost; routing is worth what it gains above it. The star is the "
        "policy of this report. The grey points combine the exits as the policy does; the table has their own logits.",
    ),
    "shares": (
        "Where images stop",
        "Share of the images that stop at each exit under the policy, and how many are right.",
    ),
    "images": (
        "Images by exit",
        "Above each image the predicted class and its confidence. Images of a row go from the highest confidence to "
        "the lowest. A wrong one has a thick frame, and its class in a second line.",
    ),
    "confusion": (
        "Confusion",
        "Rows are true classes, columns predictions. Colours show the share of the class, numbers the images.",
    ),
    "recall": ("Recall by class", "Share of each class that is predicted right."),
    "reliability": (
        "Reliability",
        "Accuracy over confidence in 15 bins, by each exit's own logits without temperatures; areas show the number of "
        "images. A network whose confidence is right lies on the line. ECE is the mean distance to it.",
    ),
}
"""The title and the caption of each figure, in the order of the page."""


def run_page(run: Run, measured: Measured | None, figures: Mapping[str, bytes], notes: Iterable[str] = ()) -> str:
    """Return the page of one run."""
    parts = [f"<h1>{escape(run.name)}</h1>"]
    if measured is not None:
        parts.append(f'<p class="result">{escape(result(measured))}</p>')
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    if measured is not None:
        parts.append(_table(*exits_table(measured)))
    for name, (title, caption) in CAPTIONS.items():
        if name in figures:
            parts += [f"<h2>{escape(title)}</h2>", _figure(figures[name], title, caption)]
        if name == "recall" and measured is not None:
            words = "The recall of every class as a table"
            parts.append(f"<details><summary>{words}</summary>{_table(*recall_table(measured))}</details>")
    parts += ["<h2>Settings</h2>", _pairs(run.described())]
    if run.config:
        parts.append(f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>")
    return _page(f"dynadapter: {run.name}", parts)


def comparison_page(
    runs: Sequence[tuple[Run, Measured | None]], figure: bytes | None, notes: Iterable[str] = ()
) -> str:
    """Return the page that compares runs."""
    parts = ["<h1>Comparison of runs</h1>", *(f'<p class="note">{escape(note)}</p>' for note in notes)]
    parts.append(_table(*comparison_table(runs)))
    if figure is not None:
        caption = "Small marks are exits, joined by the best random mixtures; large ones the policy of each run."
        parts += ["<h2>Accuracy over cost</h2>", _figure(figure, "Accuracy over cost", caption)]
    return _page("dynadapter: comparison of runs", parts)


def on_one_scale(
    runs: Sequence[tuple[Run, Measured | None]],
) -> tuple[list[tuple[Run, Measured | None]], list[str]]:
    """Return the runs with costs relative to one static network, the largest, and a note if theirs differ."""
    sizes = {run.name: one.static_gmacs for run, one in runs if one is not None}
    largest = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes or min(sizes.values()) > 0.999 * sizes[largest]:
        return list(runs), []
    scaled = [
        (run, one and replace(one, costs=tuple(cost * one.static_gmacs / sizes[largest] for cost in one.costs)))
        for run, one in runs
    ]
    return scaled, [f"costs are in % of the static network of {largest}: {sizes[largest]:.3g} GMACs"]


def result(measured: Measured) -> str:
    """Return the result in one sentence."""
    images = f"{len(measured.targets):,} {_split(measured)} images"
    if measured.exits == 1:
        return f"{measured.accuracies[0]:.1%} of {images} are right. The network has one exit."
    return (
        f"{measured.accuracy:.1%} of {images} are right at {measured.cost:.1%} of the static network's cost, under "
        f"{measured.policy.name} ({measured.origin}); the last exit alone: {measured.accuracies[-1]:.1%} at "
        f"{measured.costs[-1]:.1%}."
        + " These images may have chosen the policy: quote the cross-fitted accuracy of calibrate."
        * measured.chose_policy
    )


Table = tuple[list[str], list[list[str]]]
"""The headings and the rows of a table."""


def exits_table(measured: Measured) -> Table:
    """Return the table of the exits, and of the policy if there are several exits."""
    rows = [
        [f"exit {k + 1}, after block {depth}", f"{cost:.1%}", f"{accuracy:.1%}", f"{share:.1%}"]
        for k, (depth, cost, accuracy, share) in enumerate(
            zip(measured.exit_depths, measured.costs, measured.accuracies, measured.shares, strict=True)
        )
    ]
    if measured.exits > 1:
        rows.append([measured.policy.name, f"{measured.cost:.1%}", f"{measured.accuracy:.1%}", "100.0%"])
    return ["", "cost, % of static", f"accuracy ({measured.split})", "images that stop here"], rows


def recall_table(measured: Measured) -> Table:
    """Return the recall of each class, by each exit and under the policy; empty cells for classes without images."""
    count = len(measured.class_names)
    images = measured.targets.bincount(minlength=count).tolist()
    parts = [recall(predicted, measured.targets, count) for predicted in (*measured.predictions, measured.predicted)]
    heads = ["class", "images", *(f"exit {k + 1}" for k in range(measured.exits)), "routed"]
    return heads, [
        [name, f"{images[k]:,}", *("" if math.isnan(part[k]) else f"{part[k]:.1%}" for part in parts)]
        for k, name in enumerate(measured.class_names)
    ]


def comparison_table(runs: Sequence[tuple[Run, Measured | None]]) -> Table:
    """Return the table that compares runs."""
    exits = max((one.exits for _, one in runs if one is not None), default=0)
    split = next((one.split for _, one in runs if one is not None), "val")
    heads = ["run", *(f"exit {k + 1} ({split})" for k in range(exits)), "policy", f"accuracy ({split})"]
    heads += ["cost, % of static"]
    heads += ["trained parameters", "epochs", "minutes"]
    rows = []
    for run, one in runs:
        cells = [""] * (exits + 4)
        if one is not None:
            own = [f"{accuracy:.1%}" for accuracy in one.accuracies]
            cells = own[:-1] + [""] * (exits - len(own)) + own[-1:]
            cells += [one.policy.name, f"{one.accuracy:.1%}", f"{one.cost:.1%}", f"{one.parameters:,}"]
        minutes = "" if run.seconds is None else f"{run.seconds / 60:.1f}"
        rows.append([run.name, *cells, str(run.epochs or ""), minutes])
    return heads, rows


def _split(measured: Measured) -> str:
    return {"val": "validation", "test": "test"}[measured.split]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in pairs)
    return f'<table class="pairs">{body}</table>'


def _figure(png: bytes, title: str, caption: str) -> str:
    data = base64.b64encode(png).decode()
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _page(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
