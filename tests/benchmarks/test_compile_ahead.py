"""What is counted in compiled programs is what they do."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax import lax

from ham_jax import config, parallel

FILE = Path(__file__).parents[2] / "benchmarks" / "compile_ahead.py"
spec = importlib.util.spec_from_file_location("compile_ahead", FILE)
ahead = importlib.util.module_from_spec(spec)
sys.modules["compile_ahead"] = ahead  # dataclasses look there
spec.loader.exec_module(ahead)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the package libtpu is not installed"
)

# Batches of 5 images of 4x4: a loop of three, a fusion in on-chip memory, a reduction in two acts.
PROGRAM = """\
HloModule jit_step, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, must-alias) }, x={}

%body (p: (s32[], f32[5,4,4,3])) -> (s32[], f32[5,4,4,3]) {
  %p = (s32[], f32[5,4,4,3]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x.1 = f32[5,4,4,3]{3,2,1,0} get-tuple-element(%p), index=1
  %turn = f32[5,4,4,3]{1,2,3,0} copy(%x.1)
  ROOT %both = (s32[], f32[5,4,4,3]{3,2,1,0}) tuple(%i, %turn)
}

%less (q: (s32[], f32[5,4,4,3])) -> pred[] {
  %q = (s32[], f32[5,4,4,3]{3,2,1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%fused (a: bf16[5,4,4,3], b: bf16[3,3,3,8]) -> bf16[5,4,4,8] {
  %a = bf16[5,4,4,3]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[3,3,3,8]{3,2,1,0} parameter(1)
  ROOT %c = bf16[5,4,4,8]{3,2,1,0} convolution(%a, %b), dim_labels=b01f_01io->b01f
}

ENTRY %main (s: f32[5,4,4,3], a: bf16[5,4,4,3], b: bf16[3,3,3,8]) -> f32[5,4,4,3] {
  %s = f32[5,4,4,3]{3,2,1,0} parameter(0)
  %a.1 = bf16[5,4,4,3]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %b.1 = bf16[3,3,3,8]{3,2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %init = (s32[], f32[5,4,4,3]{3,2,1,0}) tuple(%zero, %s)
  %w = (s32[], f32[5,4,4,3]{3,2,1,0}) while(%init), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %conv = bf16[5,4,4,8]{3,2,1,0} fusion(%a.1, %b.1), kind=kOutput, calls=%fused
  %sum = (bf16[3,3,3,8]{3,2,1,0}, f32[7]{0}) all-reduce-start(%b.1, %seven), to_apply=%add
  %sum.1 = (bf16[3,3,3,8]{3,2,1,0}, f32[7]{0}) all-reduce-done(%sum)
  %cudnn = (bf16[5,4,4,8]{3,2,1,0}, u8[64]{0}) custom-call(%a.1, %b.1), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", backend_config={"f":"(x"}
  ROOT %out = f32[5,4,4,3]{3,2,1,0} get-tuple-element(%w), index=1
}
"""


def test_loops_fusions_memories_and_acts_are_told_apart():
    facts = ahead.facts(PROGRAM, batch_size=5, image_size=48)
    image, kernel, wide = 5 * 48, 3 * 3 * 3 * 8, 5 * 4 * 4 * 8
    assert facts["copies"] == 3
    assert facts["loops"] == 1
    assert facts["passes"] == 3 + 1 + 1
    assert facts["donated"] == 2
    assert facts["all-reduce"] == 1
    assert facts["all-reduce bytes"] == 2 * kernel + 4 * 7
    assert facts["targets"] == {
        "convolution b01f_01io->b01f": 1,
        "__cudnn$convForward b01f_o01i->b01f": 1,
    }
    loop, conv, reduced = 3 * 2 * 4 * image, 2 * (kernel + wide), 2 * kernel * 2 + 4 * 7
    assert facts["hbm_bytes"] == loop + conv + reduced + 2 * (kernel + wide) + 64


def test_what_xla_compiles_is_read():
    """A gather, and sums and gathers over eight devices, of programs that are compiled here."""
    mesh = parallel.mesh()
    rows, whole = parallel.batch_sharding(mesh), parallel.replicated(mesh)

    def facts(function, shardings, *arrays, **options):
        given = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            for x, s in zip(arrays, shardings, strict=True)
        ]
        compiled = jax.jit(function, **options).lower(*given).compile()
        return ahead.facts(compiled.as_text(), 2, 300)

    image = np.zeros((16, 10, 10, 3), np.float32)
    summed = facts(lambda x: x.sum(0), [rows], image, out_shardings=whole)
    assert (summed["all-reduce"], summed["all-reduce bytes"]) == (1, 1200)
    assert (summed["all-gather"], summed["gathers"], summed["donated"]) == (0, 0, 0)
    gathered = facts(lambda x: 2 * x, [rows], image, out_shardings=whole)
    assert (gathered["all-gather"], gathered["all-gather bytes"]) == (1, 16 * 1200)
    index = np.zeros((16, 10), np.int32)
    take = jax.vmap(lambda x, i: x[i])
    taken = facts(take, [rows, rows], image, index, donate_argnums=0, out_shardings=rows)
    assert (taken["gathers"], taken["all-gather"], taken["donated"]) == (1, 0, 1)
    dims = ("NHWC", "HWIO", "NHWC")
    conv = functools.partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=dims
    )
    seen = facts(conv, [rows, whole], image, np.zeros((3, 3, 3, 8), np.float32))
    assert sum(seen["targets"].values()) == 1


def settings(**augment):
    c = config.base()
    c.train.batch_size, c.data.canvas, c.model.stem = 5, (48, 64), "small"
    c.augment.update(crop_px=32, **augment)
    return c


@pytest.fixture
def compiled(monkeypatch):
    """Compiles for a TPU with nothing looked for, here or in the network."""
    for name, value in ahead.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(dump=None, form=None):
        yield functools.partial(ahead.compiled, "v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize("program", ["augment", "augment all"])
def test_on_tpu_augmentation_looks_no_pixels_up(program, compiled):
    facts = compiled(program, settings())
    assert facts["gathers"] == facts["all-gather"] == 0
    # Mixup draws its shares from a Beta distribution, by rejection.
    assert facts["loops"] == 0 or program == "augment all"


@needs_libtpu
def test_on_tpu_a_step_donates_its_state_and_convolves_as_it_was_written(compiled, small_resnet18):
    facts = compiled("train", settings())
    assert facts["all-gather"] == facts["gathers"] == 0
    assert facts["donated"] == facts["state_leaves"] > 20
    assert facts["all-reduce"] > 0
    convolutions = [name for name in facts["targets"] if name.startswith("convolution")]
    # The batch may move beside the width; the channels stay last.
    assert any("1f_01io->" in name for name in convolutions), convolutions
    assert not any("bf01_" in name for name in convolutions), convolutions


def test_a_target_that_is_not_installed_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ahead.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ahead, "ENVIRONMENT", {})
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(target=["v5e:2x2", "h100x1"], write=str(tmp_path / "out.json")):
        ahead.main(["compile_ahead.py"])
    said = capsys.readouterr().err
    assert "v5e:2x2: the package libtpu is not installed: left out." in said
    assert json.loads((tmp_path / "out.json").read_text())["programs"] == {}
