"""Frozen timm models, cut into blocks. No other package of dynadapter uses timm's model classes.

Importing this package registers the families. A family from outside the package registers itself the same way.
"""

from importlib.util import find_spec

from dynadapter.backbones import (  # noqa: F401  # each registers its family
    beit,
    eva,
    hiera,
    maps,
    naflex,
    swin,
    videomae,
    vit,
)
from dynadapter.backbones.create import create_backbone, fingerprint
from dynadapter.backbones.cut import (
    add_prefix_tokens,
    arguments,
    blocks,
    built_for,
    check_family,
    checkpointing,
    classifier,
    classify,
    convert,
    embed,
    finish,
    fixed_size,
    frames,
    has_class_token,
    in_chans,
    input_shape,
    mean_tokens,
    needs_all_tokens,
    pools_mean,
    prefix_tokens,
    reads_class_row,
    size_step,
    takes_prefix_tokens,
    tokens,
    widths,
)
from dynadapter.backbones.depth import cut_depth, remove_last_blocks
from dynadapter.backbones.draws import DrawFrom
from dynadapter.backbones.frozen import freeze, set_mode
from dynadapter.backbones.input import own_preprocessing, set_image_size
from dynadapter.backbones.limited import LimitedMemory, stored_in
from dynadapter.backbones.unit import checkpointed, run_unit
from dynadapter.backbones.vit_block import class_row, other_rows, run, run_with_exit_tokens, splits, takes_exit_tokens
from dynadapter.backbones.written_out import written_out_attention

if find_spec("timm.models.qwen3_vit") is not None:  # older releases of timm have none
    from dynadapter.backbones import qwen3  # noqa: F401

__all__ = [
    "DrawFrom",
    "LimitedMemory",
    "add_prefix_tokens",
    "arguments",
    "blocks",
    "built_for",
    "check_family",
    "checkpointed",
    "checkpointing",
    "class_row",
    "classifier",
    "classify",
    "convert",
    "create_backbone",
    "cut_depth",
    "embed",
    "fingerprint",
    "finish",
    "fixed_size",
    "frames",
    "freeze",
    "has_class_token",
    "in_chans",
    "input_shape",
    "mean_tokens",
    "needs_all_tokens",
    "other_rows",
    "own_preprocessing",
    "pools_mean",
    "prefix_tokens",
    "reads_class_row",
    "remove_last_blocks",
    "run",
    "run_unit",
    "run_with_exit_tokens",
    "set_image_size",
    "set_mode",
    "size_step",
    "splits",
    "stored_in",
    "takes_exit_tokens",
    "takes_prefix_tokens",
    "tokens",
    "widths",
    "written_out_attention",
]
