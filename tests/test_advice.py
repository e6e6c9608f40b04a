"""Recommendations follow from the numbers of a bench run."""

import pytest

from dynadapter.bench.advice import advice


def row(speedup: float, detail: str = "") -> dict:
    return {"speedup": speedup, "mac_speedup": 3.0, "images_per_second": 100 * speedup, "detail": detail}


def result(arms: dict[int, dict[str, float]], void: tuple[int, ...] = (), **changes) -> dict:
    batches = [
        {
            "batch": size,
            "void": size in void,
            "arms": {
                name: row(value, "4 blocks, 8 at a time" * (name == "smaller static")) for name, value in of.items()
            },
        }
        for size, of in arms.items()
    ]
    return {"batches": batches, "images": "real", "settings": {"shares": None, "device": "cpu"}, **changes}


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"static": 1, "merged": 2, "onnx staged": 1.5}, ["use --backend torch with merged adapters: 2.00x"]),
        ({"static": 1, "merged": 2, "onnx staged": 2.5}, ["use --backend onnx: 2.50x"]),
        ({"static": 1, "merged": 2, "openvino staged": 2.04}, ["--backend torch"]),  # too close to tell
        ({"static": 1, "merged": 0.9}, ["--backend torch", "early exits do not pay here"]),
        ({"static": 1, "merged": 2, "smaller static": 2.5}, ["--backend torch", "cut to 4 blocks is faster, 2.50x"]),
        ({"static": 1, "onnx static": 2}, []),
    ],
)
def test_lines_follow_the_numbers(arms, words):
    lines = list(advice(result({1: arms})))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_batch_size_is_recommended():
    found = list(advice(result({1: {"static": 1, "merged": 1.2}, 8: {"static": 1, "merged": 3}})))
    assert found[-1].startswith("for many images use batch 8")


def test_void_and_noise_give_no_advice():
    assert list(advice(result({1: {"static": 1, "merged": 2}}, void=(1,)))) == []
    [line] = advice(result({1: {"static": 1, "merged": 2}}, images="noise"))
    assert "no recommendation" in line


def test_gpu_gets_no_advice_for_graphs():
    """`--backend onnx` runs on a CPU, which was not timed."""
    settings = {"shares": None, "device": "cuda"}
    [line] = advice(result({1: {"static": 1, "merged": 1.5, "onnx staged": 2.5}}, settings=settings))
    assert "use --backend torch with merged adapters: 1.50x" in line
