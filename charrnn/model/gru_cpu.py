"""A GRU for training on a CPU, where torch has no fused kernel for it.

torch runs nn.GRU there as a loop of small operations, and accumulates the weights' gradients step by step. Here inputs
are projected before the loop, and the weights' gradients computed after it, each in one large matrix product; in the
backward pass everything independent of the incoming gradient is computed for a block of steps at once. Values and
gradients equal nn.GRU's up to rounding; parameters and their names are nn.GRU's own.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    m = W_hn h + b_hn                               n = tanh(W_in x + b_in + r m)
    h' = (1 - z) n + z h

Source: the equations of torch.nn.GRU's documentation. Letters: T seq_len, B batch, I width of the input, H hidden_dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CACHED = 2**17  # elements of one tensor that stay in a core's cache between operations


class _Layer(torch.autograd.Function):
    """One layer over a window, time first.

    x and the weights are in the dtype of the matrix products (low precision under autocast); h and all element-wise
    work are in fp32 at least, since a state changes by less than bf16 resolves.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Forward pass.

        Args:
            ctx: Autograd's.
            x: (T, B, I).
            h: State before the window, (B, H).
            w_ih: (3H, I), gates r, z, n.
            w_hh: (3H, H).
            b_ih: (3H,).
            b_hh: (3H,).

        Returns:
            All states, (T, B, H), and the last one, (B, H), in the dtype of h.
        """
        steps, batch, _ = x.shape
        width = h.shape[1]
        flat, gates = x.flatten(0, 1), 2 * width  # r and z have one product
        rz_lowp = torch.addmm(b_ih[:gates] + b_hh[:gates], flat, w_ih[:gates].t()).view(steps, batch, gates)
        n = torch.addmm(b_ih[gates:], flat, w_ih[gates:].t()).view(steps, batch, width).to(h.dtype)
        states = h.new_empty(steps + 1, batch, width)
        states[0] = h
        states_lowp = _in_dtype(states, x.dtype)  # as the products take them
        states_lowp[0] = h
        rz, m = _in_dtype(rz_lowp, h.dtype), torch.empty_like(n)
        m_lowp = _in_dtype(m, x.dtype)
        w_rz, w_n, b_n = w_hh[:gates].t().contiguous(), w_hh[gates:].t().contiguous(), b_hh[gates:]
        r, z = rz.split(width, dim=2)
        mixed = x.dtype != h.dtype
        each = zip(*(part.unbind() for part in (rz_lowp, rz, r, z, n, m_lowp, m)), strict=True)
        state, state_lowp = states.unbind(), states_lowp.unbind()
        for t, (rz_lowp_t, rz_t, r_t, z_t, n_t, m_lowp_t, m_t) in enumerate(each):
            rz_lowp_t.addmm_(state_lowp[t], w_rz)
            torch.addmm(b_n, state_lowp[t], w_n, out=m_lowp_t)
            if mixed:
                rz_t.copy_(rz_lowp_t)
                m_t.copy_(m_lowp_t)
            rz_t.sigmoid_()
            n_t.addcmul_(r_t, m_t).tanh_()
            torch.lerp(n_t, state[t], z_t, out=state[t + 1])
            if mixed:
                state_lowp[t + 1].copy_(state[t + 1])
        ctx.save_for_backward(x, states, states_lowp, rz, n, m, w_ih, w_hh)
        return states[1:], states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        """Backpropagation through time, in blocks of steps that fit the cache.

        `g` is the gradient of W_hh h + b_hh, (T, B, 3, H).
        """
        x, states, states_lowp, rz, n, m, w_ih, w_hh = ctx.saved_tensors
        steps, batch, width = n.shape
        gates, mixed = 2 * width, x.dtype != n.dtype
        r, z = rz.split(width, dim=2)
        g = x.new_empty(steps, batch, 3, width)
        g_n = x.new_empty(steps, batch, width)  # of W_in x + b_in
        block = min(steps, max(1, _CACHED // (batch * width)))
        d = n.new_empty(block + 1, batch, width)  # d[k + 1]: gradient of the state after step k of a block
        d[0] = d_last
        d_states_each, z_each, flat_each, d_each = d_states.unbind(), z.unbind(), g.flatten(2).unbind(), d.unbind()
        for start in reversed(range(0, steps, block)):
            part = slice(start, min(start + block, steps))
            count = part.stop - start
            # 1. Each gate's gradient per unit of the state's.
            factor = n.new_empty(count, batch, 3, width)
            to_n = 1 - z[part]
            to_n.addcmul_(to_n, n[part].square(), value=-1)
            torch.mul(to_n, r[part], out=factor[:, :, 2])
            torch.mul(factor[:, :, 2] * m[part], 1 - r[part], out=factor[:, :, 0])
            torch.mul(z[part] * (1 - z[part]), states[part] - n[part], out=factor[:, :, 1])
            # 2. The states' gradients, from the last step to the first.
            d[count] = d[0]
            factor_each, g_each = factor.unbind(), g[part].unbind()
            for k in reversed(range(count)):
                t = start + k
                d_each[k + 1].add_(d_states_each[t])
                torch.mul(factor_each[k], d_each[k + 1].unsqueeze(1), out=g_each[k])
                torch.mul(d_each[k + 1], z_each[t], out=d_each[k])
                if mixed:
                    d_each[k].add_(flat_each[t] @ w_hh)
                else:
                    d_each[k].addmm_(flat_each[t], w_hh)
            torch.mul(to_n, d[1 : count + 1], out=g_n[part])
        # 3. The weights' gradients, each in one product over all steps.
        rows, rows_n, x_rows = g.flatten(2).flatten(0, 1), g_n.flatten(0, 1), x.flatten(0, 1)
        rows_rz = rows[:, :gates]
        d_w_hh, d_b_hh = rows.t() @ states_lowp[:-1].flatten(0, 1), rows.sum(0)
        d_w_ih, d_b_ih = torch.empty_like(w_ih), torch.cat((d_b_hh[:gates], rows_n.sum(0)))
        torch.mm(rows_rz.t(), x_rows, out=d_w_ih[:gates])
        torch.mm(rows_n.t(), x_rows, out=d_w_ih[gates:])
        d_x = torch.addmm(rows_rz @ w_ih[:gates], rows_n, w_ih[gates:]).view_as(x) if ctx.needs_input_grad[0] else None
        return d_x, d[0], d_w_ih, d_w_hh, d_b_ih, d_b_hh


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where it has that dtype; else a new one of its shape, uninitialized."""
    return tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)


def is_faster_on_cpu(x: Tensor) -> bool:
    """Whether `gru_layer` beats nn.GRU on x (B, T, I): training on a CPU, over more than one step.

    docs/performance.md has the measurements.
    """
    return x.device.type == "cpu" and torch.is_grad_enabled() and x.shape[1] > 1


def gru_layer(x: Tensor, h: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Run one layer over a window, with matrix products in autocast's dtype where it is enabled.

    Args:
        x: (T, B, I).
        h: (B, H).
        weights: nn.GRU's weight_ih (3H, I), weight_hh (3H, H), bias_ih and bias_hh (3H,).

    Returns:
        All states, (T, B, H), and the last one, (B, H).
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    states, last = _Layer.apply(x.to(dtype).contiguous(), h.contiguous(), *(w.to(dtype) for w in weights))
    return states, last
