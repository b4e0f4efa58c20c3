"""The step over static buffers gives what the eager step gives, bit for bit; what can't be captured is refused."""

import pytest
import torch
from torch import nn
from training import ListRecorder, make_trainer, tiny_config

from charrnn.config import ModelConfig, OptimConfig
from charrnn.errors import ConfigError, TrainingError
from charrnn.model.rnn import CharRNN, NextCharLoss, detach, zeroed
from train.loop import train_step
from train.loop.cuda_graph import DirectCapture, GraphedStep, obstacle
from train.loop.optimizer import make_optimizer

ROWS, SEQ_LEN, SYMBOLS, STEPS = 4, 6, 7, 8


class Side:
    """A model and the update that a trainer makes: loss, backward, unscale, clip, AdamW, loss scale."""

    def __init__(self, rnn="LSTM", *, scale=0.0, dropout=0.0):
        torch.manual_seed(0)
        config = ModelConfig(rnn=rnn, embedding_dim=5, hidden_dim=8, layer_norm=True, dropout=dropout)
        self.model = CharRNN(config, SYMBOLS)
        self.loss_of = NextCharLoss(self.model)
        self.optimizer = make_optimizer(self.model, OptimConfig())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, enabled=bool(scale))
        self.state = self.model.zero_state(ROWS)
        self.made = 0

    def update(self, window, state, targets=None):
        torch.manual_seed(self.made)  # of the dropout masks
        self.made += 1
        loss, after = self.loss_of(window, state, targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach(), norm, detach(after)

    def eager(self, window, reset, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, norm, self.state = self.update(window, zeroed(self.state, torch.from_numpy(reset)))
        return loss, norm

    def graphed(self, capture, *options):
        return GraphedStep(self.update, self.optimizer, self.state, SEQ_LEN, capture, *options)

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


def inputs(step):
    draw = torch.Generator().manual_seed(step)
    window = torch.randint(SYMBOLS, (ROWS, SEQ_LEN + 1), generator=draw)
    return window, (torch.rand(ROWS, generator=draw) < 0.4).numpy(), 0.01 / (step + 3)


class Recording(DirectCapture):
    """Notes what it is asked for; the replayed step finds whatever lies in the static buffers, as a graph would."""

    def __init__(self):
        self.calls = []

    def warm_up(self, step):
        self.calls.append("warm up")
        step()

    def capture(self, step):
        self.calls.append("capture")

        def replay():
            self.calls.append("replay")
            step()

        return replay


class Failing(Recording):
    def __init__(self, error, side=None):
        super().__init__()
        self.error, self.side = error, side

    def capture(self, step):
        if self.side:  # a capture that breaks off after unscaling
            self.side.scaler.scale(torch.zeros(()))
            self.side.scaler.unscale_(self.side.optimizer)
        raise self.error


def same(left, right):
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
@pytest.mark.parametrize("scale", [0.0, 1024.0, 2.0**127], ids=["unscaled", "scaled", "overflowing"])
def test_static_buffers_equal_eager_bit_for_bit(rnn, scale):
    eager, other = Side(rnn, scale=scale, dropout=0.2), Side(rnn, scale=scale, dropout=0.2)
    capture = Recording()
    graphed, scales = other.graphed(capture), []
    for step in range(STEPS):
        assert same(eager.eager(*inputs(step)), graphed(*inputs(step)))
        assert same(eager.weights(), other.weights())
        assert same(eager.state, graphed.state)
        scales.append(other.scaler.get_scale())
        assert eager.scaler.get_scale() == scales[-1]
    assert capture.calls == ["warm up"] * 3 + ["capture"] + ["replay"] * (STEPS - 3)
    assert len(set(scales)) > 1 or not scale  # it grows, or shrinks after an overflow


@pytest.mark.parametrize("buffer", ["_window", "_reset", "_lr"])
def test_a_stale_buffer_is_noticed(buffer):
    """The comparison above fails when any input stays that of the first step."""
    eager, other = Side(), Side()
    graphed = other.graphed(DirectCapture())
    for step in range(3):
        eager.eager(*inputs(step))
        stale = {"_window": 0, "_reset": 1, "_lr": 2}[buffer]
        fed = [value if i != stale else inputs(0)[i] for i, value in enumerate(inputs(step))]
        graphed(*fed)
    assert not same([*eager.weights(), *eager.state], [*other.weights(), *graphed.state])


def test_results_survive_the_next_step():
    graphed = Side().graphed(DirectCapture())
    first = graphed(*inputs(0))
    kept = [part.clone() for part in first]
    graphed(*inputs(1))
    assert same(first, kept)


def test_the_optimizer_is_capturable_from_the_capture_on():
    side, seen = Side(), []
    graphed = side.graphed(Recording())
    original = side.update
    graphed._update = lambda *args: seen.append(side.optimizer.param_groups[0]["capturable"]) or original(*args)
    for step in range(5):
        graphed(*inputs(step))
    assert seen == [False] * 3 + [True] * 2


def test_a_failed_capture_goes_on_eagerly_and_says_so(caplog):
    eager, other = Side(scale=1024.0), Side(scale=1024.0)

    def recover():
        other.optimizer.zero_grad()
        other.scaler.update(other.scaler.get_scale())

    failing = Failing(RuntimeError("CUDA error: operation not\npermitted"), other)
    graphed = other.graphed(failing, recover)
    for step in range(STEPS):
        eager.eager(*inputs(step))
        graphed(*inputs(step))
    assert same(eager.weights(), other.weights())
    assert [r.getMessage() for r in caplog.records] == [
        "training step: eager, because its capture as a CUDA graph failed: CUDA error: operation not permitted"
    ]


@pytest.mark.parametrize(("error", "kind", "part"), [
    (RuntimeError("not permitted"), TrainingError, "set train.cuda_graph to false"),
    (torch.OutOfMemoryError("tried to allocate 2 GiB"), torch.OutOfMemoryError, "2 GiB"),
])  # fmt: skip
def test_a_failed_capture_ends_the_run_where_ranks_must_agree(error, kind, part):
    graphed = Side().graphed(Failing(error), None, 0)
    with pytest.raises(kind, match=part):
        graphed(*inputs(0))


DDP = {"backend": "nccl", "nccl": (2, 27, 3), "async_error_handling": "0"}


@pytest.mark.parametrize(("facts", "part"), [
    ({"device_type": "cpu"}, "not cpu"),
    ({"documents": True}, "document_end"),
    ({**DDP, "backend": "gloo"}, "gloo"),
    ({**DDP, "nccl": (2, 9, 5)}, "2.9.5"),
    ({**DDP, "compressed": True}, "grad_compression"),
    ({**DDP, "async_error_handling": None}, "TORCH_NCCL_ASYNC_ERROR_HANDLING=0"),
])  # fmt: skip
def test_what_can_not_be_captured_is_known_beforehand(facts, part):
    assert part in obstacle(**{"device_type": "cuda", **facts})
    assert obstacle("cuda") == obstacle("cuda", **DDP) == ""


@pytest.mark.parametrize("settings", [
    ["model.rnn=LSTM", "model.layer_norm=true", "data.windows=carry", "data.reset=0.3"],
    ["model.dropout=0.3", "train.accumulation_steps=2", "optim.schedule=linear"],
], ids=["carry", "sliding"])  # fmt: skip
def test_a_graphed_trainer_trains_logs_saves_and_resumes_as_an_eager_one(tmp_path, settings):
    runs = []
    for name in ("eager", "graphed"):
        config = tiny_config(tmp_path, [*settings, f"train.run_dir={tmp_path / name}", "sample.length=0"])
        for steps in (7, 12):  # the second trainer resumes in the middle of an epoch
            recorder = ListRecorder()
            section = config.train.model_copy(update={"max_steps": steps})
            trainer = make_trainer(config.model_copy(update={"train": section}), recorder)
            if name == "graphed":
                update = trainer.update
                update.graphed = GraphedStep(
                    update.compute, update.optimizer, update.state, config.data.seq_len, DirectCapture()
                )
            trainer.fit()
        kept = {
            k: v for k, v in trainer.metrics.latest.items() if not k.startswith(("train/chars", "train/g", "train/m"))
        }
        runs.append((recorder.losses(), kept, list(trainer.model.parameters()), trainer.update.state))
    eager, graphed = runs
    assert eager[:2] == graphed[:2]
    assert same(eager[2], graphed[2])
    assert same(eager[3], graphed[3])


def test_a_cpu_trains_eagerly_and_refuses_to_be_told_otherwise(tmp_path):
    assert make_trainer(tiny_config(tmp_path)).update.graphed is None
    with pytest.raises(ConfigError, match=r"train.cuda_graph is true, but a CUDA graph needs a CUDA device"):
        make_trainer(tiny_config(tmp_path, ["train.cuda_graph=true"]))


def test_what_can_be_captured_is_if_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "obstacle_here", lambda *_, **__: "")
    monkeypatch.setattr(train_step, "CudaCapture", lambda stream: DirectCapture())
    for asked, graphed in (("auto", True), ("true", True), ("false", False)):
        trainer = make_trainer(tiny_config(tmp_path, [f"train.cuda_graph={asked}", "train.max_steps=5"]))
        trainer.update.capture(trainer.config, object(), documents=False)
        assert (trainer.update.graphed is not None) == graphed
        trainer.fit()
