"""One optimizer step: forward, backward, clip, step.

Letters: B batch_size (global), T seq_len, L num_layers, H hidden_dim.
"""

import contextlib
import logging

import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from charrnn.config import RunConfig
from charrnn.errors import ConfigError
from charrnn.model.rnn import State, detach, zeroed
from charrnn.windows import rank_slice
from train.loop.cuda_graph import DDP_WARMUP_STEPS, CudaCapture, GraphedStep, obstacle_here
from train.loop.dataloader import to_device

log = logging.getLogger(__name__)


class TrainStep:
    """Trains a model on one batch after another, with the hidden state carried from each to the next.

    The wrappers that Accelerate puts around optimizer and scaler are left out of the loop: they look for optional
    packages and walk over all prepared objects at every call.

    Attributes:
        state: The hidden state after the last step, each (L, B / world, H).
        loss_module: The model and its loss, as Accelerate wraps them.
        optimizer: torch's own.
        scaler: Scales the loss under fp16; None otherwise.
        graphed: `compute` as a CUDA graph, which then makes the steps; None = eager.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loss_module: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: State,
        *,
        accumulation_steps: int = 1,
        grad_clip: float = 0.0,
    ) -> None:
        """Prepare to train.

        Args:
            accelerator: Whose scaler is used under fp16.
            loss_module: A NextCharLoss, as Accelerate wraps it.
            optimizer: Of its parameters.
            state: To start from.
            accumulation_steps: Micro-batches of a step.
            grad_clip: Largest global gradient norm; 0 = no clipping.
        """
        self.state, self.optimizer, self.scaler = state, optimizer, accelerator.scaler
        self._accelerator, self.loss_module = accelerator, loss_module
        self._parameters = list(loss_module.parameters())
        self._accumulation_steps, self._grad_clip = accumulation_steps, grad_clip
        self.graphed: GraphedStep | None = None
        self._zero_state = tuple(torch.zeros_like(part) for part in state)

    def capture(self, config: RunConfig, stream: torch.cuda.Stream | None, *, documents: bool) -> None:
        """Make the steps from now on as a CUDA graph if train.cuda_graph asks for it; on a GPU the choice is logged.

        Args:
            config: The run's.
            stream: Of `side_stream`, on which the loss module was wrapped.
            documents: Whether the state is reset within windows.

        Raises:
            ConfigError: train.cuda_graph is true, and the step can't be captured here.
        """
        mode, device = config.train.cuda_graph, self.state[0].device
        reason = obstacle_here(device, self.loss_module, config, documents=documents)
        if reason and mode is True:
            raise ConfigError(f"train.cuda_graph is true, but {reason}; set it to auto or false")
        if reason or mode is False or stream is None:
            if stream is not None and mode is not False:
                log.info("training step: eager, because %s", reason)
            return

        def recover() -> None:
            self.optimizer.zero_grad()
            if self.scaler:
                self.scaler.update(self.scaler.get_scale())  # forgets that gradients were unscaled
            # CUDAGraph::capture_end raises before it takes the generator, which draws dropout, out of capture mode; a
            # copy of its state is not in that mode.
            generator = torch.cuda.default_generators[device.index or 0]
            generator.graphsafe_set_state(generator.clone_state())

        log.info("training step: replayed as one CUDA graph")
        static = self.compute, self.optimizer, self.state, config.data.seq_len, CudaCapture(stream)
        if isinstance(self.loss_module, DistributedDataParallel):
            # Graphs with collectives must be launched on all ranks: one can't go on eagerly alone.
            self.graphed = GraphedStep(*static, None, DDP_WARMUP_STEPS)
        else:
            self.graphed = GraphedStep(*static, recover)

    def __call__(
        self, window: Tensor, reset: NDArray, lr: float, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make one step.

        Args:
            window: This rank's ids, (B / world, T + 1).
            reset: Rows that begin with a zero state, (B / world,) bool.
            lr: Learning rate.
            targets: The teachers' probabilities, (B / world, T, V); None without teachers.

        Returns:
            This rank's loss in nats/char and the global gradient's norm before clipping, each (), on the device.
        """
        if self.graphed:
            loss, grad_norm = self.graphed(window, reset, lr, targets)
            self.state = self.graphed.state
            return loss, grad_norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm, self.state = self.compute(window, self.state_before(reset), targets)
        return loss, grad_norm

    def state_before(self, reset: NDArray) -> State:
        """The state that a batch starts from, each (L, B / world, H): the last one's, zero in the rows to reset."""
        if reset.all():
            return self._zero_state
        return zeroed(self.state, to_device(reset, self.state[0].device)) if reset.any() else self.state

    def gathered_state(self) -> State:
        """The hidden state over the global batch, each (L, B, H); every rank calls this."""
        rows_first = (part.transpose(0, 1).contiguous() for part in self.state)  # (B / world, L, H)
        return tuple(self._accelerator.gather(part).transpose(0, 1) for part in rows_first)

    def restore_state(self, gathered: State, rows: slice) -> None:
        """Continue from this rank's rows of a `gathered_state`."""
        device = self.state[0].device
        self.state = tuple(part[:, rows].contiguous().to(device) for part in gathered)

    def compute(self, window: Tensor, state: State, targets: Tensor | None = None) -> tuple[Tensor, Tensor, State]:
        """Forward, backward, clip, optimizer step. A CUDA graph captures it, so the host may ask for no value here.

        Args:
            window: This rank's ids, (B / world, T + 1).
            state: Each (L, B / world, H).
            targets: The teachers' probabilities, (B / world, T, V); None without teachers.

        Returns:
            Loss and gradient norm, each (), and the state after the batch.
        """
        loss, state = self._accumulate(window, state, targets)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        grad_norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._grad_clip:
            clip_grads_with_norm_(self._parameters, self._grad_clip, grad_norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, grad_norm, state

    def gradient_square(self, window: Tensor, state: State, targets: Tensor | None = None) -> Tensor:
        """The squared norm of this rank's own gradient on some windows, (); changes no weights and no generators."""
        device = window.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self._without_sync():
            loss, _ = self.loss_module(window, state, targets)
            scale = self.scaler.get_scale() if self.scaler else 1.0
            (loss * scale).backward()
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None]) / scale
        self.optimizer.zero_grad()
        return norm.square()

    def half_gradient(self, window: Tensor, reset: NDArray, targets: Tensor | None = None) -> tuple[float, int] | None:
        """Measure the gradient of half of each rank's rows or of a micro-batch ahead of a step; every rank calls this.

        Args:
            window: This rank's ids, (B / world, T + 1).
            reset: Rows that begin with a zero state, (B / world,) bool.
            targets: The teachers' probabilities, (B / world, T, V); None without teachers.

        Returns:
            The mean over the ranks of the squared norm, and the rows of each; None where a rank has one row.
        """
        rows = len(window) // max(2, self._accumulation_steps)  # no more than fit into memory
        if not rows:
            return None
        state = tuple(part[:, :rows].contiguous() for part in self.state_before(reset))
        square = self.gradient_square(window[:rows], state, _rows(targets, slice(rows)))
        if self._accelerator.num_processes > 1:
            square = self._accelerator.reduce(square, "mean")
        return square.item(), rows

    def _accumulate(self, window: Tensor, state: State, targets: Tensor | None) -> tuple[Tensor, State]:
        """Backward over equal micro-batches, so that the mean of their losses is the mean over all characters."""
        if self._accumulation_steps == 1:
            return self._backward(window, state, targets, 1)
        losses, states = [], []
        for i in range(self._accumulation_steps):
            rows = rank_slice(len(window), i, self._accumulation_steps)
            part = tuple(each[:, rows].contiguous() for each in state)
            # Gradients cross the ranks once a step, with the last micro-batch.
            last = i == self._accumulation_steps - 1
            with contextlib.nullcontext() if last else self._without_sync():
                loss, after = self._backward(window[rows], part, _rows(targets, rows), self._accumulation_steps)
            losses.append(loss)
            states.append(after)
        merged = tuple(torch.cat(parts, dim=1) for parts in zip(*states, strict=True))  # each (L, B / world, H)
        return torch.stack(losses).mean(), merged

    def _backward(self, window: Tensor, state: State, targets: Tensor | None, parts: int) -> tuple[Tensor, State]:
        """Loss of a micro-batch, one of `parts`, and the state after it; its gradient is added to the parameters'."""
        loss, after = self.loss_module(window, state, targets)
        share = loss / parts if parts > 1 else loss
        (self.scaler.scale(share) if self.scaler else share).backward()
        return loss.detach(), detach(after)

    def _without_sync(self) -> contextlib.AbstractContextManager[None]:
        return self._accelerator.no_sync(self.loss_module)


def _rows(targets: Tensor | None, rows: slice) -> Tensor | None:
    return None if targets is None else targets[rows]
