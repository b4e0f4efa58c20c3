"""What ends training by itself: figures that are not finite, windows outside the text, too little memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import make_trainer, tiny_config

from charrnn.config import RunConfig
from charrnn.errors import EXIT_USER_ERROR, TrainingError
from charrnn.windows import Batch
from train.loop.dataloader import check_inside
from train.loop.errors import check_finite, memory_explained, out_of_memory

NOT_FINITE = [math.nan, math.inf, -math.inf]
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FINITE, FINITE, FINITE), max_size=20), st.booleans())
def test_finite_figures_pass_however_large(figures, judged):
    lrs, losses, norms = zip(*figures, strict=True) if figures else ((), (), ())
    check_finite(99, lrs, losses, norms if judged else None, "run")


@given(
    count=st.integers(1, 20),
    step=st.integers(20, 10**6),
    bad=st.dictionaries(st.integers(0, 19), st.tuples(st.booleans(), st.sampled_from(NOT_FINITE)), min_size=1),
)
def test_the_first_update_that_is_not_finite_is_named_with_its_figures(count, step, bad):
    """bad: for updates of the last `count`, whether the loss is spoilt or the norm, and what it is."""
    losses, norms, lrs = [1.5] * count, [2.5] * count, [0.25 + i for i in range(count)]
    bad = {i: fault for i, fault in bad.items() if i < count} or {count - 1: (True, math.nan)}
    for i, (is_loss, value) in bad.items():
        (losses if is_loss else norms)[i] = value
    with pytest.raises(TrainingError) as caught:
        check_finite(step, lrs, losses, norms, "checkpoints/run")
    i = min(bad)
    assert str(caught.value).startswith(
        f"training diverged at step {step - count + 1 + i}: loss {losses[i]}, learning rate {lrs[i]:.3g}, "
        f"gradient norm {norms[i]}; the last good checkpoint in checkpoints/run is kept; lower optim.lr"
    )


@pytest.mark.parametrize("value", NOT_FINITE)
def test_gradients_that_the_loss_scaler_judges_are_left_to_it_but_losses_are_not(value):
    check_finite(1, [0.1], [1.5], None, "run")
    with pytest.raises(TrainingError) as caught:
        check_finite(1, [0.1], [value], None, "run")
    assert f"at step 1: loss {value}, learning rate 0.1;" in str(caught.value)


@given(
    starts=st.lists(st.integers(-5, 110), min_size=1, max_size=20),
    length=st.integers(1, 30),
    num_chars=st.integers(1, 100),
)
def test_a_window_that_leaves_the_text_is_refused_and_no_other(starts, length, num_chars):
    if min(starts) >= 0 and max(starts) + length <= num_chars:
        check_inside(np.array(starts), length, num_chars, 6)
        return
    with pytest.raises(TrainingError, match=rf"^the batch of step 7 wants characters .* of {num_chars}: an index is"):
        check_inside(np.array(starts), length, num_chars, 6)


@pytest.mark.parametrize(("start", "span"), [(-1, "-1 to 4971"), (2**40, f"0 to {2**40 + 17}")])
def test_a_corrupted_index_ends_training_before_the_update_and_the_checkpoint_before_is_kept(tmp_path, start, span):
    trainer = make_trainer(tiny_config(tmp_path, ["eval.every=0", "sample.length=0"]))
    batch = trainer.data.plan.batch

    def corrupted(step):
        whole = batch(step)
        if step != 6:
            return whole
        starts = np.minimum(whole.starts, 4954)
        starts[:2] = 4954, 0
        starts[3] = start
        return Batch(starts, whole.reset)

    object.__setattr__(trainer.data.plan, "batch", corrupted)
    with pytest.raises(TrainingError, match=f"the batch of step 7 wants characters {span} of 5400: an index is"):
        trainer.fit()
    assert list(trainer.recorder.losses()) == list(range(1, 7))
    assert [p.name for p in trainer.checkpoints.run_dir.iterdir()] == ["step-00000005"]


def test_a_lack_of_memory_names_what_to_lower_and_is_one_line():
    config = RunConfig.model_validate({"data": {"batch_size": 64}, "train": {"accumulation_steps": 2}})
    error = out_of_memory(config, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\na total capacity")
    assert str(error) == (
        "the device ran out of memory (tried to allocate 2.00 GiB); lower data.batch_size (now 64), data.seq_len "
        "(now 128) or model.hidden_dim (now 256), or raise train.accumulation_steps (now 2), which keeps the batch"
    )
    assert error.exit_code == EXIT_USER_ERROR
    for size in (1 << 45, 1 << 62):  # on a CPU
        with (
            pytest.raises(TrainingError, match=r"ran out of memory .* lower data\.batch_size"),
            memory_explained(RunConfig()),
        ):
            torch.empty(size)
