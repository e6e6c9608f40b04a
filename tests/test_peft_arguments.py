"""Which configurations of peft a specification may hold; none of these tests needs the package."""

import json
import sys

import pytest
from conftest import make_vit, raises_one_line

from dynadapter import Peft, inject
from dynadapter.adapters import Adapters, adapter_layers
from dynadapter.spec import plain, restore

LORA = Peft("LoraConfig", {"r": 4, "target_modules": ["qkv", "fc1"], "rank_pattern": {"blocks.1.attn.qkv": 2}})


def test_as_json_and_back():
    assert plain(LORA)["init_args"]["config"] == "LoraConfig"
    assert restore(json.loads(json.dumps(plain(LORA))), Adapters) == LORA
    assert LORA.arguments["target_modules"] == ("qkv", "fc1")


@pytest.mark.parametrize(
    ("config", "arguments", "match"),
    [
        ("XLoraConfig", {}, "config='XLoraConfig' is none of LoraConfig, IA3Config, OFTConfig, VeraConfig, LNTun"),
        ("os.system", {}, "config='os.system' is none of"),
        (print, {}, "Peft has the config <built-in function print>; give one of LoraConfig"),
        ("IA3Config", {"r": 4}, "IA3Config may not have 'r'; it may have target_modules"),
        ("LoraConfig", {"init_lora_weights": "pissa"}, "LoraConfig may not have 'init_lora_weights'"),
        ("LoraConfig", {"modules_to_save": ["head"]}, "LoraConfig may not have 'modules_to_save'"),
        ("LoraConfig", {"corda_config": {"cache_file": "/etc/passwd"}}, "LoraConfig may not have 'corda_config'"),
        ("LoraConfig", {"r": 10**9}, "r=1000000000; give numbers from 0 to 4096"),
        ("LoraConfig", {"r": 2.5}, "r: 2.5 is not a whole number"),
        ("LoraConfig", {"r": -1}, "r=-1; give"),
        ("LoraConfig", {"lora_dropout": float("nan")}, "lora_dropout=nan; give .* from 0 to 1"),
        ("LoraConfig", {"target_modules": ".*qkv"}, "target_modules: '.*qkv' is not a list"),
        (
            "LoraConfig",
            {"target_modules": ["(a+)+$"]},
            "target_modules=.*; give names of layers out of letters, digits, '_' and '.'$",
        ),
        ("LoraConfig", {"rank_pattern": {"(a+)+$": 2}}, "rank_pattern=.*; give names of .* and numbers from 0 to 4096"),
        ("LoraConfig", {"target_modules": ["qkv"] * 1001}, "target_modules=.*; give names"),
        ("VeraConfig", {"projection_prng_key": 2**40}, "projection_prng_key=.* to 2.14748e"),
    ],
)
def test_configurations_that_are_refused(config, arguments, match):
    with raises_one_line(ValueError, match=match):
        Peft(config, arguments)
    if isinstance(config, str):  # as a file of anybody would hold it
        with pytest.raises(ValueError, match=match):
            restore({"class_path": "Peft", "init_args": {"config": config, "arguments": arguments}}, Adapters)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = make_vit()
    with pytest.raises(ValueError, match=r"^Peft needs the package peft; install it by pip install 'dyna"):
        inject(model, LORA)
    assert not adapter_layers(model)
