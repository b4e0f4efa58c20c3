"""Which precision training computes in on which device.

cuDNN's recurrent layers under autocast compute in fp16 whatever type autocast is set to: ATen's wrapper casts to half
(aten/src/ATen/cudnn/AutocastRNN.cpp). Training in "bf16" would so be fp16 without a loss scale, and small gradients
would underflow. On CUDA, bf16 therefore means fp16 with a loss scale unless the installed torch does better.
"""

import os

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn


def device_type() -> str:
    """torch's name of the type of device that training runs on; the environment may ask for the CPU."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def resolve_precision(requested: str, device_type: str, *, bf16_rnn: bool, bf16_cpu: bool) -> str:
    """The precision that Accelerate is set to: "no", "fp16" or "bf16".

    Args:
        requested: "native", "no", "fp16" or "bf16".
        device_type: torch's name of the device's type.
        bf16_rnn: Whether recurrent layers compute in bf16 on the GPU when autocast is set to it.
        bf16_cpu: Whether the CPU multiplies bf16 in hardware.
    """
    if device_type == "cuda":
        return "fp16" if requested in ("native", "bf16") and not bf16_rnn else requested.replace("native", "bf16")
    if requested == "native":
        return "bf16" if device_type == "cpu" and bf16_cpu else "no"
    return requested


def training_precision(requested: str) -> str:
    """`train.mixed_precision` on this process's device, as Accelerate takes it; "auto" is the launcher's."""
    if requested == "auto":
        requested = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if (kind := device_type()) != "cuda":
        return resolve_precision(requested, kind, bf16_rnn=False, bf16_cpu=cpu_multiplies_bf16())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    bf16_rnn = requested in ("native", "bf16") and recurrent_type(device, torch.bfloat16) == torch.bfloat16
    return resolve_precision(requested, "cuda", bf16_rnn=bf16_rnn, bf16_cpu=False)


def recurrent_type(device: torch.device, autocast: torch.dtype) -> torch.dtype:
    """The type of an LSTM's output on `device` when autocast is set to `autocast`: on CUDA, what it computes in."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        lstm = nn.LSTM(8, 8).to(device)
        with torch.autocast(device.type, autocast):
            return lstm(torch.zeros(1, 1, 8, device=device))[0].dtype


def cpu_multiplies_bf16() -> bool:
    """Whether oneDNN gains from bf16: on a CPU with AVX512-BF16 or AMX."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def describe_precision(requested: str, used: str, device_type: str) -> str:
    """The precision as the opening lines show it: with its loss scale, and with what was asked for where it differs."""
    text = f"{used} with loss scaling" if used == "fp16" else used
    if device_type == "cuda" and used == "fp16" and requested == "bf16":
        text += f" (not bf16: cuDNN's recurrent layers compute in fp16 under autocast in torch {torch.__version__})"
    return text
