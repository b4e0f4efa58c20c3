"""The training step as one CUDA graph: captured once over static buffers, then replayed by a single launch.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Letters: B batch (of a rank), T seq_len.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from charrnn.config import RunConfig
from charrnn.errors import TrainingError
from charrnn.model.rnn import State, zeroed
from train.loop.dataloader import to_device
from train.loop.errors import is_out_of_memory

log = logging.getLogger(__name__)

# window (B, T + 1), state and targets (B, T, V) or None to loss (), gradient norm () and the state after; leaves no
# gradients behind.
Compute = Callable[[Tensor, State, Tensor | None], tuple[Tensor, Tensor, State]]
Step = Callable[[], None]

WARMUP_STEPS, DDP_WARMUP_STEPS = 3, 11
# The first version whose collectives can be captured.
_NCCL_CAPTURABLE = (2, 9, 6)


class DirectCapture:
    """No capture: runs the step itself, over the same static buffers. What remains to be done without a GPU."""

    def warm_up(self, step: Step) -> None:
        """Run `step` eagerly, where it will be captured."""
        step()

    def capture(self, step: Step) -> Step:
        """Record `step` without running it, and return what replays it."""
        return step


class CudaCapture(DirectCapture):
    """Capture on a side stream, which DDP must have been constructed on too."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def warm_up(self, step: Step) -> None:
        """Run `step` on the side stream, ordered before and after the current stream's work."""
        with on_stream(self._stream):
            step()

    def capture(self, step: Step) -> Step:
        """Record `step`; other threads, which write checkpoints and watch the peers, may use CUDA meanwhile."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                step()
        finally:  # a failed capture leaves the side stream current
            torch.cuda.set_stream(before)
        return graph.replay


class GraphedStep:
    """`update` over static buffers: eager for the warm-up steps, which count as training, then captured and replayed.

    Attributes:
        state: The hidden state after the last step, each part (L, B, H); overwritten by the next one.
    """

    def __init__(
        self,
        update: Compute,
        optimizer: torch.optim.Optimizer,
        state: State,
        seq_len: int,
        capture: DirectCapture,
        recover: Step | None = lambda: None,
        warmup_steps: int = WARMUP_STEPS,
    ) -> None:
        """Take over the optimizer's learning rate, which becomes a tensor.

        Args:
            update: Forward, backward, clipping, optimizer step and clearing of the gradients.
            optimizer: A fused AdamW: its step count and loss scale stay on the device.
            state: The hidden state to start from, each part (L, B, H).
            seq_len: T.
            capture: How to capture.
            recover: Undo what a failed capture leaves behind, after which training stays eager; None = raise.
            warmup_steps: Eager steps before the capture.
        """
        device, rows = state[0].device, state[0].shape[1]
        self.state = tuple(part.clone() for part in state)
        self._update, self._optimizer, self._capture, self._recover = update, optimizer, capture, recover
        self._window = torch.zeros(rows, seq_len + 1, dtype=torch.long, device=device)
        self._reset = torch.zeros(rows, dtype=torch.bool, device=device)
        # CUDA's kernel reads the rate as float32, the CPU's as float64.
        self._lr = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        self._loss, self._grad_norm = torch.zeros((), device=device), torch.zeros((), device=device)
        self._targets: Tensor | None = None  # (B, T, V) from the first step that has them, an eager one
        self._remaining = warmup_steps
        self._replay: Step | None = None
        for group in optimizer.param_groups:
            group["lr"] = self._lr

    def __call__(
        self, window: Tensor, reset: NDArray[np.bool_], lr: float, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make one training step.

        Args:
            window: Ids, (B, T + 1).
            reset: Rows that begin with a zero state, (B,) bool.
            lr: Learning rate.
            targets: The teachers' probabilities, (B, T, V): at every step or at none.

        Returns:
            Loss and gradient norm, each (), on the device.
        """
        if targets is not None:
            self._targets = torch.empty_like(targets) if self._targets is None else self._targets
            self._targets.copy_(targets)
        self._window.copy_(window)
        self._reset.copy_(to_device(reset, self._reset.device))
        self._lr.fill_(lr)
        if self._remaining:
            self._remaining -= 1
            self._capture.warm_up(self._step)
        else:
            self._replay = self._replay or self._captured()
            self._replay()
        return self._loss.clone(), self._grad_norm.clone()

    def _step(self) -> None:
        loss, grad_norm, after = self._update(self._window, zeroed(self.state, self._reset), self._targets)
        for part, new in zip(self.state, after, strict=True):
            part.copy_(new)
        self._loss.copy_(loss)
        self._grad_norm.copy_(grad_norm)

    def _captured(self) -> Step:
        """Raises: TrainingError when the capture fails and can't be recovered from."""
        self._set_capturable(True)
        try:
            return self._capture.capture(self._step)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a failed capture raises too, and says less
            if is_out_of_memory(cause):
                raise cause from None
            reason = " ".join(str(cause).split())[:200]
            if self._recover is None:
                raise TrainingError(
                    f"capturing the training step as a CUDA graph failed: {reason}; set train.cuda_graph to false, and "
                    "rerun the same command to resume"
                ) from None
            log.warning("training step: eager, because its capture as a CUDA graph failed: %s", reason)
        self._recover()
        self._set_capturable(False)
        return self._step

    def _set_capturable(self, capturable: bool) -> None:
        # torch warns of a capturable optimizer that runs eagerly, as in the warm-up.
        for group in self._optimizer.param_groups:
            group["capturable"] = capturable


def obstacle(
    device_type: str,
    *,
    documents: bool = False,
    backend: str = "",
    compressed: bool = False,
    nccl: tuple[int, ...] = (),
    async_error_handling: str | None = None,
) -> str:
    """Why a training step can't be captured; empty when it can.

    Args:
        device_type: Of the training device.
        documents: Whether the state is reset within windows, whose pieces have other shapes each time.
        backend: The process group's under DDP, empty without.
        compressed: Whether DDP has a communication hook.
        nccl: NCCL's version.
        async_error_handling: The value of TORCH_NCCL_ASYNC_ERROR_HANDLING.
    """
    if device_type != "cuda":
        return f"a CUDA graph needs a CUDA device, not {device_type}"
    if documents:
        return "data.document_end makes shapes depend on the text"
    if not backend:
        return ""
    if backend != "nccl":
        return f"collectives of {backend} can't be captured"
    if nccl < _NCCL_CAPTURABLE:
        return f"NCCL {'.'.join(map(str, nccl))} can't be captured, from 2.9.6 on it can"
    if compressed:
        return "train.grad_compression runs Python in the backward pass"
    if async_error_handling != "0":
        return "under DDP torch needs TORCH_NCCL_ASYNC_ERROR_HANDLING=0 in the environment"
    return ""


def obstacle_here(device: torch.device, module: nn.Module, config: RunConfig, *, documents: bool) -> str:
    """`obstacle` for a wrapped module on this machine."""
    ddp: dict[str, Any] = {}
    if device.type == "cuda" and isinstance(module, DistributedDataParallel):
        ddp = {
            "backend": str(dist.get_backend(module.process_group)),
            "compressed": config.train.grad_compression != "none",
            "nccl": tuple(torch.cuda.nccl.version()),
            "async_error_handling": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"),
        }
    return obstacle(device.type, documents=documents, **ddp)


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream to construct DDP, warm up and capture on; None without a CUDA device."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """The block's CUDA work goes to `stream`, ordered before and after the current stream's; None changes nothing."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
