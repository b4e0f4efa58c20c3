"""Checks of the arithmetic: losses and gradients against the CPU, in every precision."""

import statistics
import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.results import Value
from benchmarks.gpu.setup import Setup, allow_tf32, largest_difference, train
from charrnn.config import ModelConfig
from charrnn.model.rnn import CharRNN, NextCharLoss, State
from train.loop.dataloader import IdSource
from train.loop.evaluation import evaluate
from train.loop.flops import published_peak

_SYMBOLS = 65
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def environment(setup: Setup) -> Value:
    """Versions and the GPU's properties."""
    found: Value = {name: version(name) for name in ("torch", "accelerate", "numpy", "onnx", "onnxruntime")}
    if setup.on_gpu:
        name = torch.cuda.get_device_name()
        found |= {
            "GPU": name,
            "capability": torch.cuda.get_device_capability(),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "published peak, bf16 and fp32": [published_peak(name, p) for p in ("bf16", "no")],
        }
    return found


def types(setup: Setup) -> Value:
    """The type that recurrent layers compute in under each autocast.

    Training in bf16 must be bf16 in the recurrent layers too: else the trainer has to use fp16 and its loss scale.
    """
    found: Value = {}
    for cell in (nn.LSTM, nn.GRU):
        for wanted in [_DTYPES[p] for p in setup.precisions if p != "no"]:
            rnn = cell(128, 128, batch_first=True).to(setup.device)
            with torch.autocast(setup.device.type, wanted):
                out, _ = rnn(torch.randn(8, 16, 128, device=setup.device))
            found[f"{cell.__name__}, autocast {wanted}"] = str(out.dtype)
    return found


def weight_layout(setup: Setup) -> Value:
    """No model has its recurrent weights copied at every call, which cuDNN's caller warns of."""
    found: Value = {}
    kinds: list[dict[str, Any]] = [{}, {"model__layer_norm": True}, {"model__dropout": 0.2}]
    for change in kinds:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            setup.losses(setup.config(model__rnn="LSTM", **change), 2)
        found[" ".join(change) or "plain"] = sum("contiguous chunk" in str(w.message) for w in seen)
    return {"ok": not any(found.values()), **found}


def parity(setup: Setup) -> Value:
    """Loss and gradients of one window batch against fp64 on the CPU, relative, with TF32 off and on.

    cuDNN's kernels change with the width: torch asks for those of small ones up to 128 and 192.
    """
    widths = (64, 128, 160, 192, 512) if setup.on_gpu else (16, 24)
    kinds: list[tuple[str, dict[str, Any], int | None, int]] = [("plain", {}, None, width) for width in widths]
    kinds += [("layer norm", {"layer_norm": True}, None, widths[1]), ("documents", {}, 3, widths[1])]
    found, worst = {}, {"fp32": 0.0, "tf32": 0.0}
    for cell in ("GRU", "LSTM"):
        for name, extra, end, width in kinds:
            torch.manual_seed(0)
            config = ModelConfig(rnn=cell, embedding_dim=32, hidden_dim=width, num_layers=2, **extra)
            model = CharRNN(config, _SYMBOLS, end)
            ids = torch.randint(0, _SYMBOLS, (8, setup.size(41, 11)))
            state = tuple(torch.randn_like(part) * 0.1 for part in model.zero_state(8))
            exact_loss, exact = _gradients(model, ids, state, torch.device("cpu"), torch.float64)
            for label in worst:
                allow_tf32(label == "tf32")
                loss, gradients = _gradients(model, ids, state, setup.device, torch.float32)
                error = float((gradients - exact).norm() / exact.norm())
                found[f"{cell} {name} {width}, {label}"] = f"{abs(loss / exact_loss - 1):.1e} {error:.1e}"
                worst[label] = max(worst[label], error)
    allow_tf32(False)
    return {"ok": worst["fp32"] < 1e-4, "worst gradient": worst, "loss and gradient": found}


def _gradients(
    model: CharRNN, ids: Tensor, state: State, device: torch.device, dtype: torch.dtype
) -> tuple[float, Tensor]:
    copy = CharRNN(model.config, _SYMBOLS, model.document_end)
    copy.load_state_dict(model.state_dict())
    loss_of = NextCharLoss(copy).to(device, dtype)
    loss, _ = loss_of(ids.to(device), tuple(part.to(device, dtype) for part in state))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu().double() for p in loss_of.parameters() if p.grad is not None])


def curve(setup: Setup) -> Value:
    """The losses of 60 steps in fp32 against the CPU's."""
    allow_tf32(False)
    found: Value = {}
    for cell, norm in (("LSTM", True), ("GRU", False)):
        config = setup.config(model__rnn=cell, model__layer_norm=norm)
        ours, theirs = (setup.losses(config, setup.size(60, 12), cpu=cpu) for cpu in (False, True))
        first, all_ = largest_difference(ours[:10], theirs[:10]), largest_difference(ours, theirs)
        found[cell] = {"first 10": first, "all": all_, "last loss": ours[-1]}
    return {"ok": all(v["first 10"] < 1e-4 and v["all"] < 5e-3 for v in found.values()), **found}


def evaluation(setup: Setup) -> Value:
    """The validation loss of one set of weights in fp32, where TF32 must be off, against the CPU's."""
    config = setup.config("shakespeare.yaml", model__dropout=0.0, train__mixed_precision="no")
    trainer = setup.trainer(config)
    train(trainer, setup.size(150, 10))
    allow_tf32(True)  # torch's default for cuDNN
    here = evaluate(trainer.model, trainer.data.val, config.eval, trainer.accelerator)
    weights = {name: value.cpu() for name, value in trainer.model.state_dict().items()}
    other = setup.trainer(config, cpu=True)
    other.model.load_state_dict(weights)
    there = evaluate(other.model, IdSource(other.data.corpus.val, torch.device("cpu")), config.eval, other.accelerator)
    allow_tf32(False)
    differences = {name: abs(here[name] - there[name]) for name in here if name.endswith("loss")}
    return {"ok": max(differences.values()) < 2e-5, **differences}


def precisions(setup: Setup) -> Value:
    """300 steps of the shipped network in each precision: training and validation loss, and the loss scale."""
    found: dict[str, Any] = {}
    for precision in setup.precisions:
        options = {"model__dropout": 0.0, "data__batch_size": setup.size(128, 8), "log__every": 10}
        config = setup.config("shakespeare.yaml", train__mixed_precision=precision, **options)
        trainer = setup.trainer(config)
        losses = train(trainer, setup.size(300, 20))
        validation = evaluate(trainer.model, trainer.data.val, config.eval, trainer.accelerator)
        scaler = trainer.accelerator.scaler
        found[precision] = {
            "used": trainer.accelerator.mixed_precision,
            "train": statistics.mean(losses[-5:]),
            "windows": validation["val/windows/loss"],
            "loss scale": scaler.get_scale() if scaler else None,
        }
    worst = max(abs(v["windows"] - found["no"]["windows"]) for v in found.values())
    return {"ok": worst < 0.02, "worst": worst, **found}
