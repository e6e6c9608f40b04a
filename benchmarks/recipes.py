"""What is trained and how: the kinds of adapters, and the recipes for training them with exits or without."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from structured import StructuredDropout

from dynadapter import (
    Adapter,
    AdapterSpec,
    Balanced,
    Constant,
    Distillation,
    EarlyToLate,
    Heads,
    LateToEarly,
    LinearHeads,
    LinearInDepth,
    LoRA,
    MLPHeads,
    PerExit,
    RepAdapter,
    Schedule,
    Step,
    TokenMerging,
    Uniform,
    Weighting,
)

METHODS: dict[str, Callable[[float], AdapterSpec] | None] = {
    "probe": None,
    "adapter": lambda scale: Adapter(scale=scale),
    "lora": lambda scale: LoRA(scale=scale),
    "repadapter": lambda scale: RepAdapter(scale=scale),
    "full": None,
}
"""What learns, by name: an adapter of a scale; or the heads alone (probe), or everything (full)."""


@dataclass(frozen=True)
class Recipe:
    """How a network with exits is trained. The defaults are the package's own.

    Args:
        exits: After how many blocks the exits stand; None puts one after every ``every``, none at all is static.
        every: Interval of the exits in blocks.
        heads: The early heads.
        weighting: The weights of the exits' losses over the progress of training.
        shallow: Dropout in the first block's adapter; None leaves every adapter its own rate.
        deep: Dropout in the last block's.
        keep: Share of the adapter elements that move in a step.
        masked: As in :class:`dynadapter.BidirectionalSparsity`.
        distillation: What the early exits learn from the last one.
        rescale: Scale the gradients that exits send into the backbone, so that a block gets the mean over the exits
            behind it and not their sum (Li et al. 2019, gradient equilibrium).
        within: Keep gradients inside their stage: an adapter learns from the next exit alone.
        early_scale: Factor on the scale of the adapters before the first exit.
        early_width: Factor on rank or bottleneck of the adapters before the first exit.
        token_merging: Where like tokens are merged, in training and after.
        structured: What early exits of sub-networks learn from the whole network, at about half a step's cost more.
    """

    exits: tuple[int, ...] | None = None
    every: int = 3
    heads: Heads = Balanced()  # noqa: RUF009 - frozen
    weighting: Weighting = EarlyToLate()  # noqa: RUF009
    shallow: Schedule | None = Constant(0.2)  # noqa: RUF009
    deep: Schedule = Constant(0.0)  # noqa: RUF009
    keep: Schedule = Constant(0.9)  # noqa: RUF009
    masked: Literal["frozen", "gradient"] = "frozen"
    distillation: Distillation | None = None
    rescale: bool = False
    within: bool = False
    early_scale: float = 1.0
    early_width: int = 1
    token_merging: TokenMerging | None = None
    structured: StructuredDropout | None = None

    @property
    def static(self) -> bool:
        """Whether there is no exit but the last."""
        return self.exits == ()


def last_first(share: float, early: int = 3) -> PerExit:
    """Gives weights by which the last exit learns alone for a share of training, and then all exits together.

    Source: Kubaty et al. 2024 (arXiv 2407.14320), the mixed regime.
    """
    return PerExit((*(Step(0.0, 1.0, at=share),) * early, Constant(1.0)))


STATIC: dict[str, Any] = {"exits": (), "weighting": Uniform(), "shallow": None, "keep": Constant(1.0)}
"""Plain training, as the papers on adapters do it: no exits, the adapters' own dropout, no masks."""


def _once(after: tuple[int, ...], share: float) -> TokenMerging:
    """Merging as it was before tokens were counted: each counts once, whatever it stands for."""
    return TokenMerging(after, share, proportional=False)


MERGED: dict[str, Any] = {"heads": LinearHeads(), "token_merging": _once(after=(0,), share=0.5)}
"""The paper's recipe with linear heads on half of the tokens."""

COUNTED: dict[str, Any] = {
    "heads": LinearHeads(),
    "weighting": Uniform(),
    "token_merging": TokenMerging(after=(1, 4), share=0.4),
}
"""Equal weights for all exits, linear heads, and two mergings whose tokens count as often as they stand for tokens."""

DEEP: dict[str, Any] = COUNTED | {"weighting": LinearInDepth(), "shallow": None, "keep": Constant(1.0)}
"""The same, with weights that rise with depth, and neither dropout by depth nor masks."""

GRADUAL = TokenMerging(after=(1, 2, 3, 4), share=0.23)
"""As many tokens less as two times 40 %, in four steps: a step finds like ones for so few, and forces none."""

VARIANTS: dict[str, dict[str, Any]] = {
    "static": STATIC,
    "base": {},
    # the paper's ingredients, one changed at a time
    "linear-heads": {"heads": LinearHeads()},
    "balanced-heads": {"heads": Balanced()},
    "uniform": {"weighting": Uniform()},
    "early-to-late": {"weighting": EarlyToLate()},
    "late-to-early": {"weighting": LateToEarly()},
    "linear-in-depth": {"weighting": LinearInDepth()},
    "no-forward": {"shallow": None},
    "forward": {"shallow": Constant(0.2)},
    "no-backward": {"keep": Constant(1.0)},
    "backward": {"keep": Constant(0.9)},
    "sparsity": {"shallow": Constant(0.2), "keep": Constant(0.9)},
    "no-sparsity": {"shallow": None, "keep": Constant(1.0)},
    # sparsity without exits: what it does to the rival
    "static-sparse": {"exits": (), "weighting": Uniform()},
    # loss and gradients
    "no-distillation": {"distillation": None},
    "distill": {"distillation": Distillation()},
    "structured": {"structured": StructuredDropout()},
    "structured-strong": {"structured": StructuredDropout(rate=0.4)},
    "distill-most": {"distillation": Distillation(share=0.9)},
    "distill-hot": {"distillation": Distillation(temperature=4.0)},
    "rescale": {"rescale": True},
    "last-first": {"weighting": last_first(0.5)},
    "last-first-25": {"weighting": last_first(0.25)},
    "within": {"within": True},
    "early-to-late-0": {"weighting": EarlyToLate(floor=0.0)},
    "early-to-late-30": {"weighting": EarlyToLate(floor=0.3)},
    # heads
    "mlp-heads": {"heads": MLPHeads()},
    "narrow-heads": {"heads": Balanced(hidden=32)},
    "wide-heads": {"heads": Balanced(hidden=128)},
    "wide-mlp-heads": {"heads": MLPHeads(hidden=128)},
    "mean-pooling": {"heads": Balanced(pooling="mean")},
    "mean-mlp-heads": {"heads": MLPHeads(pooling="mean")},
    # where the exits stand
    "every-2": {"every": 2},
    "every-4": {"every": 4},
    "exits-4-8": {"exits": (4, 8)},
    "exits-4-6-8": {"exits": (4, 6, 8)},
    "exits-6-9": {"exits": (6, 9)},
    "exits-2-4-6-8-10": {"exits": (2, 4, 6, 8, 10)},
    # dropout and masks
    "dropout-flat": {"shallow": Constant(0.1), "deep": Constant(0.1)},
    "dropout-rising": {"shallow": Constant(0.0), "deep": Constant(0.2)},
    "dropout-strong": {"shallow": Constant(0.4)},
    "keep-70": {"keep": Constant(0.7)},
    "keep-50": {"keep": Constant(0.5)},
    "keep-70-gradient": {"keep": Constant(0.7), "masked": "gradient"},
    # adapters before the first exit
    "early-scale-3": {"early_scale": 3.0},
    "early-width-4": {"early_width": 4},
    # fewer tokens, whose saving multiplies with that of the exits
    "merged": MERGED,
    "merged-distilled": MERGED | {"distillation": Distillation()},
    "merged-less": MERGED | {"token_merging": _once(after=(0,), share=0.35), "distillation": Distillation()},
    "merged-later": MERGED | {"token_merging": _once(after=(1, 4), share=0.4)},
    "merge": {"token_merging": _once(after=(1, 4), share=0.4)},
    "merge-first": {"token_merging": _once(after=(0,), share=0.5)},
    "merge-late": {"token_merging": _once(after=(3, 6, 9), share=0.4)},
    "merge-most": {"token_merging": _once(after=(1, 3, 6), share=0.5)},
    "merge-least": {"token_merging": _once(after=(1, 4), share=0.25)},
    "counted": COUNTED,
    "counted-deep": DEEP,
    "gradual": DEEP | {"token_merging": GRADUAL},
    "merge-twice": {"token_merging": TokenMerging(after=(1, 4), share=0.4)},
    "merge-twice-less": {"token_merging": TokenMerging(after=(1, 4), share=0.3)},
    "merge-once": {"token_merging": TokenMerging(after=(3,), share=0.5)},
    "merge-six": {"token_merging": TokenMerging(after=(1, 2, 3, 4, 5, 6), share=0.18)},
    "once": {"token_merging": _once(after=(1, 4), share=0.4)},
    "every-token": {"token_merging": None},
    "static-merge": STATIC | {"token_merging": _once(after=(1, 4), share=0.4)},
    "static-counted": STATIC | {"token_merging": TokenMerging(after=(1, 4), share=0.4)},
    "static-merged": STATIC | {"token_merging": _once(after=(0,), share=0.5)},
}
"""Changes of the recipe by name; names may be joined, as in ``distill+rescale``."""

INGREDIENTS = {
    "linear-heads": "linear heads, not balanced ones",
    "balanced-heads": "balanced heads, not linear ones",
    "uniform": "equal loss weights, no schedule",
    "early-to-late": "loss weights from early to late",
    "late-to-early": "loss weights from late to early",
    "linear-in-depth": "loss weights linear in depth",
    "no-forward": "no forward sparsity (dropout)",
    "forward": "forward sparsity (dropout)",
    "no-backward": "no backward sparsity (masks)",
    "backward": "backward sparsity (masks)",
    "no-distillation": "no distillation",
    "distill": "distillation",
    "merge-twice": "tokens merged in two large steps, not in four small ones",
    "every-token": "no token merging",
}
"""What the ablation exchanges one by one, the paper's own and ours, in words."""

PAPER = "base"
"""The recipe of the paper."""

DEFAULT = "gradual"
"""The recipe that tables and figures show."""


def exchanges(name: str) -> dict[str, str]:
    """Gives the recipes that differ from one by an ingredient, with what differs in words.

    >>> exchanges("base")["uniform"]
    'equal loss weights, no schedule'
    """
    joined = {(part if name == PAPER else f"{name}+{part}"): text for part, text in INGREDIENTS.items()}
    return {other: text for other, text in joined.items() if recipe(other) != recipe(name)}


def recipe(name: str) -> Recipe:
    """Makes the recipe of a name.

    >>> recipe("distill+uniform").weighting
    Uniform()

    Raises:
        ValueError: There is none of that name.
    """
    changes: dict[str, Any] = {}
    for part in name.split("+"):
        if part not in VARIANTS:
            raise ValueError(f"there is no recipe {part!r}; there are {', '.join(VARIANTS)}, joined by +")
        changes |= VARIANTS[part]
    return replace(Recipe(), **changes)
