"""benchmarks/quality: what the recipe is held against."""

import math
import random

import pytest

from benchmarks.quality.any_text import cut, ppmd_loss, random_configuration
from charrnn.config import UNSIZED, load_config


def test_ppmd_codes_noise_at_its_entropy_and_repetition_freely():
    pytest.importorskip("pyppmd")
    draw = random.Random(0)
    noise = "".join(draw.choices("abcdefgh", k=40_000))
    assert ppmd_loss(noise, 4000) == pytest.approx(math.log(8), rel=0.05)
    assert ppmd_loss("to be or not to be, " * 2000, 4000) < 0.05


def test_ppmd_in_pieces_forgets_what_it_learned_in_the_tenth():
    pytest.importorskip("pyppmd")
    draw = random.Random(0)
    others, line = ("".join(draw.choices("abcdefgh", k=k)) for k in (10_000, 256))
    text = others + line * 10  # of the tenth the first piece is new, and the others repeat it
    assert ppmd_loss(text, 2560) < 0.3 * math.log(8)
    assert ppmd_loss(text, 2560, in_pieces=True) == pytest.approx(math.log(8), rel=0.1)
    assert ppmd_loss(others + line, 256, in_pieces=True) == ppmd_loss(others + line, 256)


def test_random_configurations_are_valid_and_differ():
    draw = random.Random(1)
    configs = [random_configuration(draw) for _ in range(50)]
    for fields in configs:
        load_config(None, UNSIZED, [f"{key}={value}" for key, value in fields.items()])
    assert len({str(fields) for fields in configs}) == 50
    assert {fields["train.init_from"] for fields in configs} == {"base", "none"}


def test_cut_drops_byte_order_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\nthree".encode())
    assert cut(f"name={path}", 0) == ("name", "one\ntwo\nthree")
    assert cut(f"name={path}@4", 3) == ("name", "two")
