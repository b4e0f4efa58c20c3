"""No tensor of a step lies on the wrong device, and the host waits for none: shown on torch's meta device."""

import sys
from contextlib import suppress

import pytest
import torch
import training
from accelerate.state import PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import make_trainer, tiny_config

from charrnn.model.rnn import CharRNN
from train.loop.cuda_graph import DirectCapture, GraphedStep

META = torch.device("meta")
# What crosses for a step: where its 8 windows begin, and which of its 8 states are reset.
EXPECTED = {((8,), torch.int64), ((8,), torch.bool)}


class Placement(TorchDispatchMode):
    """Notes each operator that mixes devices, as CUDA's refuse to, and each tensor that goes to or from the device.

    mixed: operators. sent: shapes and types. waits: operators that bring a value to the host, which would wait.
    """

    def __init__(self):
        super().__init__()
        self.mixed, self.sent, self.waits = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = str(func)
        if name.startswith("aten._local_scalar_dense") and tensors[0].is_meta:
            self.waits.append(name)
            return 1
        if name.startswith("aten._to_copy"):
            to = torch.device(kwargs.get("device") or tensors[0].device)
            if to.type == "cpu" and tensors[0].is_meta:
                self.waits.append(name)
                return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
            if to == META and not tensors[0].is_meta:
                self.sent.append((tuple(tensors[0].shape), tensors[0].dtype))
        elif name.startswith("aten.copy_") and tensors[0].is_meta and not tensors[1].is_meta:
            self.sent.append((tuple(tensors[1].shape), tensors[1].dtype))
        # A number of the host's may meet tensors of the device's.
        elif len({t.device for t in tensors if t.dim() or t.is_meta}) > 1:
            self.mixed.append(name)
        if name == "aten._fused_adamw_.tensor_lr":  # in place, and without a kernel for the meta device
            return None
        return func(*args, **kwargs)


@pytest.fixture
def on_meta(monkeypatch):
    """Trainers are made on the meta device, parameters and optimizer included."""
    original = training.fresh_accelerator

    def accelerator(**options):
        made = original(**options)
        PartialState._shared_state["device"] = made.state.device = META
        return made

    monkeypatch.setattr(training, "fresh_accelerator", accelerator)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
    torch.__future__.set_swap_module_params_on_conversion(True)  # the optimizer keeps the parameters that it was given
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


SETTINGS = ["data.windows=carry", "data.reset=0.3", "sample.length=0", "train.max_steps=50"]
KINDS = {
    "GRU": ["model.rnn=GRU"],
    "LSTM, layer norm": ["model.rnn=LSTM", "model.layer_norm=true"],
    "window dropout": ["model.rnn=LSTM", "model.dropout=0.3", "model.dropout_mask=window"],
    "micro-batches": ["train.accumulation_steps=2", "model.dropout=0.3"],
    "no clipping": ["optim.grad_clip=0"],
    "sliding": ["data.windows=sliding", "data.reset=0"],
}


def trainer_on_meta(folder, kind):
    trainer = make_trainer(tiny_config(folder, [*SETTINGS, *KINDS[kind]]))
    assert {p.device for group in trainer.update.optimizer.param_groups for p in group["params"]} == {META}
    return trainer


def steps(trainer, count):
    for _ in range(count):
        trainer.next_step()
        trainer.train_step()


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_stay_on_the_device(tmp_path, on_meta, kind):
    trainer = trainer_on_meta(tmp_path, kind)
    with Placement() as seen:
        steps(trainer, 2)
    assert (seen.mixed, seen.waits) == ([], [])
    assert seen.sent
    assert set(seen.sent) <= EXPECTED


def test_replayed_steps_stay_on_the_device(tmp_path, on_meta):
    trainer = trainer_on_meta(tmp_path, "LSTM, layer norm")
    update = trainer.update
    update.graphed = GraphedStep(update.compute, update.optimizer, update.state, 16, DirectCapture())
    with Placement() as seen:
        steps(trainer, 5)
    assert (seen.mixed, seen.waits) == ([], [])
    assert set(seen.sent) <= EXPECTED


def test_a_log_line_waits_once(tmp_path, on_meta):
    trainer = trainer_on_meta(tmp_path, "GRU")
    with Placement() as seen:
        steps(trainer, 3)
        trainer.log()
    assert len(seen.waits) == 1


@pytest.mark.parametrize("sample", [0, 300])
def test_evaluation_stays_on_the_device(tmp_path, on_meta, sample):
    trainer = make_trainer(tiny_config(tmp_path, [*SETTINGS, f"eval.sample={sample}"]))
    with Placement() as seen:
        trainer.evaluate()
    assert seen.mixed == []
    assert len(seen.waits) <= 2  # one for the sums of each protocol
    assert trainer.metrics.latest


@pytest.mark.parametrize(("wrong", "found"), [
    (lambda loss: loss + torch.ones(3), "mixed"),
    (lambda loss: loss + torch.ones(3, device=META), None),
    (lambda loss: loss.item(), "waits"),
    (lambda loss: loss.cpu(), "waits"),
    (lambda loss: loss + torch.ones(3).to(META), "sent"),
])  # fmt: skip
def test_a_tensor_on_the_wrong_device_is_found(tmp_path, on_meta, wrong, found):
    """Negative control: what is planted into a step, and nothing else, is noted."""
    trainer = trainer_on_meta(tmp_path, "GRU")
    compute = trainer.update.compute

    def planted(*args):
        loss, *rest = compute(*args)
        with suppress(RuntimeError):  # torch may refuse a mixture itself
            wrong(loss)
        return loss, *rest

    trainer.update.compute = planted
    with Placement() as seen:
        steps(trainer, 1)
    noted = {"mixed": seen.mixed, "waits": seen.waits, "sent": [s for s in seen.sent if s not in EXPECTED]}
    assert [name for name, what in noted.items() if what] == ([found] if found else [])


def test_a_state_made_on_the_host_is_refused(tmp_path, on_meta, monkeypatch):
    trainer = trainer_on_meta(tmp_path, "GRU")
    original = CharRNN.zero_state
    monkeypatch.setattr(CharRNN, "zero_state", lambda self, rows, device=None: original(self, rows))
    with pytest.raises(RuntimeError, match="not at the same device"):
        trainer.evaluate()
