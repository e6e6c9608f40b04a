"""Check the name and the arguments of a backbone that a file names, before timm sees them.

timm loads weights from ``local-dir:`` and ``hf-hub:`` names, from ``checkpoint_path`` and from ``pretrained_cfg``: a
file could make it read any file or request any address. A checkpoint, a bundle or a run folder may therefore only name
timm's own architectures, and the arguments in the tables below with plain values of limited size.
"""

import re
from collections.abc import Mapping
from typing import Any

NUMBERS = {
    "img_size": 4096,
    "frames": 1024,
    "tubelet_size": 256,
    "patch_size": 256,
    "in_chans": 1024,
    "embed_dim": 16384,
    "dims": 16384,
    "depth": 512,
    "depths": 512,
    "layers": 512,
    "channels": 16384,
    "stem_width": 16384,
    "cardinality": 1024,
    "base_width": 4096,
    "w0": 16384,
    "wa": 16384,
    "wm": 1024,
    "group_size": 16384,
    "bottle_ratio": 64,
    "se_ratio": 64,
    "stages": 512,
    "num_heads": 1024,
    "head_dim": 4096,
    "window_size": 1024,
    "reg_tokens": 1024,
    "kernel_sizes": 255,
    "output_stride": 64,
    "head_hidden_size": 16384,
    "mlp_ratio": 64,
    "init_values": 1000,
    "ls_init_value": 1000,
    "head_init_scale": 1000,
    "norm_eps": 1,
    "drop_rate": 1,
    "drop_path_rate": 1,
    "proj_drop_rate": 1,
    "attn_drop_rate": 1,
    "pos_drop_rate": 1,
    "patch_drop_rate": 1,
}
"""Arguments that are a number from 0 to this one, or a list of such numbers."""
SWITCHES = {
    "qkv_bias",
    "proj_bias",
    "qk_norm",
    "scale_attn_norm",
    "scale_mlp_norm",
    "class_token",
    "no_embed_class",
    "pre_norm",
    "final_norm",
    "fc_norm",
    "pool_include_prefix",
    "dynamic_img_size",
    "dynamic_img_pad",
    "strict_img_size",
    "always_partition",
    "fix_init",
    "head_norm_first",
    "conv_mlp",
    "avg_down",
    "replace_stem_pool",
    "conv_bias",
    "use_grn",
    "use_abs_pos_emb",
    "use_rel_pos_bias",
    "use_shared_rel_pos_bias",
}
"""Arguments that are true or false."""
WORDS = {"rope_type", "encoder_pool", "global_pool", "pos_embed", "weight_init", "stem_type", "norm_layer", "act_layer"}
"""Arguments that are one word, which timm looks up in a table of its own."""

WORD = re.compile("[a-z0-9_]{0,40}")
NAME = re.compile(r"[A-Za-z0-9_]{1,100}(\.[A-Za-z0-9_-]{1,100})?")
LONGEST = 16
TRUSTED = "if you trust it, name it in Python, on the command line or in a config given by -c"


def check_name(name: object) -> None:
    """Refuse a name that timm would not look up in its own list of models.

    :func:`~dynadapter.backbones.create_backbone` then takes a name from that list, or of a packaged backbone.

    Raises:
        ValueError: The name has a prefix such as ``hf-hub:`` or ``local-dir:``, or another form.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"the file names the backbone {name!r:.100}, which is none of timm.list_models(); {TRUSTED}")


def check_arguments(arguments: object) -> None:
    """Refuse arguments of a backbone that are not in the tables of this module.

    Raises:
        ValueError: An argument or its value is not allowed.
    """
    if arguments is None:
        return
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the file's arguments of the backbone are {arguments!r:.100}, not a mapping")
    for name, value in arguments.items():
        if name not in NUMBERS and name not in SWITCHES and name not in WORDS:
            raise ValueError(
                f"the file gives the backbone the argument {name!r:.100}, which is none of the architecture's "
                f"({', '.join(sorted([*NUMBERS, *SWITCHES, *WORDS]))}); {TRUSTED}"
            )
        if value is not None and not _fits(name, value):
            raise ValueError(f"the file gives the backbone {name}={value!r:.100}; {_allowed(name)}")


def _fits(name: str, value: Any) -> bool:
    if name in SWITCHES:
        return isinstance(value, bool)
    if name in WORDS:
        return isinstance(value, str) and WORD.fullmatch(value) is not None
    values = value if isinstance(value, list | tuple) else [value]
    return len(values) <= LONGEST and all(
        isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= NUMBERS[name] for one in values
    )


def _allowed(name: str) -> str:
    if name in NUMBERS:
        return f"a file may give a number from 0 to {NUMBERS[name]:,}, or at most {LONGEST} of them"
    return "a file may give true or false" if name in SWITCHES else "a file may give a word of timm's"
