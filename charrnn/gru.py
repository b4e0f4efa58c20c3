"""nn.GRU's arithmetic for training on a CPU, where torch has no fused kernel for it.

torch runs its GRU there as a loop of small operations and adds every step's share to the weights' gradients in that
loop. Here inputs are projected before the loop and gradients of weights taken after it, each in one large product, and
in the loop's backward half all that does not depend on the gradient has been computed before. The values are those of
nn.GRU up to rounding; so are the parameters and their names.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    m = W_hn h + b_hn                               n = tanh(W_in x + b_in + r m)
    h' = (1 - z) n + z h

Source: the equations of torch.nn.GRU's documentation. Letters: T seq_len, B batch, I width of the input, H hidden_dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _Layer(torch.autograd.Function):
    """One layer over a window, time first. The type of x and the weights is that of products; h and what is not
    multiplied by a matrix are fp32 at least, so that a state changes by less than bf16 can tell.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x: (T, B, I). h: (B, H). Returns all states, (T, B, H), and the last one, in the type of h."""
        steps, batch, _ = x.shape
        width = h.shape[1]
        flat, gates = x.flatten(0, 1), 2 * width  # r and z have one product
        rz_product = torch.addmm(b_ih[:gates] + b_hh[:gates], flat, w_ih[:gates].t()).view(steps, batch, gates)
        n = torch.addmm(b_ih[gates:], flat, w_ih[gates:].t()).view(steps, batch, width).to(h.dtype)
        states = h.new_empty(steps + 1, batch, width)
        states[0] = h
        factors = _twin(states, x.dtype)  # states as the products take them
        factors[0] = h
        rz, m = _twin(rz_product, h.dtype), torch.empty_like(n)
        m_product = _twin(m, x.dtype)
        w_rz, w_n, b_n = w_hh[:gates].t().contiguous(), w_hh[gates:].t().contiguous(), b_hh[gates:]
        r, z = rz.split(width, dim=2)
        mixed = x.dtype != h.dtype
        each = zip(*(part.unbind() for part in (rz_product, rz, r, z, n, m_product, m)), strict=True)
        state, factor = states.unbind(), factors.unbind()
        for t, (rz_product_t, rz_t, r_t, z_t, n_t, m_product_t, m_t) in enumerate(each):
            rz_product_t.addmm_(factor[t], w_rz)
            torch.addmm(b_n, factor[t], w_n, out=m_product_t)
            if mixed:
                rz_t.copy_(rz_product_t)
                m_t.copy_(m_product_t)
            rz_t.sigmoid_()
            n_t.addcmul_(r_t, m_t).tanh_()
            torch.lerp(n_t, state[t], z_t, out=state[t + 1])
            if mixed:
                factor[t + 1].copy_(state[t + 1])
        ctx.save_for_backward(x, states, factors, rz, n, m, w_ih, w_hh)
        return states[1:], states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        """Backpropagation through time; `g` is the gradient of what W_hh h + b_hh gives, (T, B, 3, H)."""
        x, states, factors, rz, n, m, w_ih, w_hh = ctx.saved_tensors
        steps, batch, width = n.shape
        r, z = rz.split(width, dim=2)
        # 1. What each gate's gradient is per unit of the state's.
        g = n.new_empty(steps, batch, 3, width)
        to_n = (1 - z).mul_(1 - n * n)
        torch.mul(to_n, r, out=g[:, :, 2])
        g[:, :, 0] = g[:, :, 2] * m * (1 - r)
        g[:, :, 1] = (states[:-1] - n) * z * (1 - z)
        # 2. The states' gradients, from the last step to the first; d[t + 1] is that of what step t gives.
        d = n.new_empty(steps + 1, batch, width)
        d[0] = 0
        d[1:] = d_states
        d[-1] += d_last
        g_factors = _twin(g, x.dtype)
        mixed = x.dtype != n.dtype
        d_each, z_each, g_each = d.unbind(), z.unbind(), g.unbind()
        factor_each, flat_each = g_factors.unbind(), g_factors.flatten(2).unbind()
        for t in reversed(range(steps)):
            torch.mul(g_each[t], d_each[t + 1].unsqueeze(1), out=factor_each[t])
            d_each[t].addcmul_(d_each[t + 1], z_each[t])
            if mixed:
                d_each[t].add_(flat_each[t] @ w_hh)
            else:
                d_each[t].addmm_(flat_each[t], w_hh)
        # 3. The weights' gradients, each in one product over all steps.
        rows = g_factors.view(steps * batch, 3 * width)
        d_w_hh, d_b_hh = rows.t() @ factors[:-1].flatten(0, 1), rows.sum(0)
        # From here on it is the gradient of what W_ih x + b_ih gives.
        torch.mul(to_n, d[1:], out=g_factors[:, :, 2])
        d_w_ih, d_b_ih = rows.t() @ x.flatten(0, 1), rows.sum(0)
        d_x = (rows @ w_ih).view_as(x) if ctx.needs_input_grad[0] else None
        return d_x, d[0], d_w_ih, d_w_hh, d_b_ih, d_b_hh


def _twin(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where it is of that type; else a new one of its shape, not filled in."""
    return tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)


def pays(x: Tensor) -> bool:
    """Whether `gru_layer` is the quicker way: in training on a CPU (docs/performance.md), over more than one step."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and x.shape[1] > 1


def gru_layer(x: Tensor, h: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One layer over a window, its products in autocast's type where that is on.

    x: (T, B, I). h: (B, H). weights: nn.GRU's weight_ih (3H, I), weight_hh (3H, H), bias_ih, bias_hh (3H,). Returns all
    states, (T, B, H), and the last one, (B, H).
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    states, last = _Layer.apply(x.to(dtype).contiguous(), h.contiguous(), *(w.to(dtype) for w in weights))
    return states, last


def run_gru(rnn: nn.GRU, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """What rnn(x, h) computes. x: (B, T, I). h: (L, B, H). Returns (B, T, H) and the state after it, (L, B, H)."""
    x = x.transpose(0, 1)  # (T, B, I)
    last = []
    for i in range(rnn.num_layers):
        weights = [getattr(rnn, f"{name}_l{i}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        x, after = gru_layer(F.dropout(x, rnn.dropout, rnn.training) if i and rnn.dropout else x, h[i], weights)
        last.append(after)
    return x.transpose(0, 1), torch.stack(last)
