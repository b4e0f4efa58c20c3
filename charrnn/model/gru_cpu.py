"""nn.GRU's arithmetic for training on a CPU, where torch has no fused kernel for it.

torch runs its GRU there as a loop of small operations and adds every step's share to the weights' gradients in that
loop. Here inputs are projected before the loop and gradients of weights taken after it, each in one large product, and
going back all that does not depend on the gradient is computed for several steps at once. The values are those of
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

_CACHED = 2**17  # numbers of one kind that stay in a core's cache between a few steps' operations


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
        """Backpropagation through time, a few steps at a time, whose numbers the cache holds.

        `g` is the gradient of what W_hh h + b_hh gives, (T, B, 3, H).
        """
        x, states, factors, rz, n, m, w_ih, w_hh = ctx.saved_tensors
        steps, batch, width = n.shape
        gates, mixed = 2 * width, x.dtype != n.dtype
        r, z = rz.split(width, dim=2)
        g = x.new_empty(steps, batch, 3, width)
        g_n = x.new_empty(steps, batch, width)  # what W_in x + b_in has in place of W_hn h + b_hn's
        few = min(steps, max(1, _CACHED // (batch * width)))
        d = n.new_empty(few + 1, batch, width)  # d[k + 1] is the gradient of the state that step k of a few gives
        d[0] = d_last
        d_states_each, z_each, flat_each, d_each = d_states.unbind(), z.unbind(), g.flatten(2).unbind(), d.unbind()
        for start in reversed(range(0, steps, few)):
            part = slice(start, min(start + few, steps))
            count = part.stop - start
            # 1. What each gate's gradient is per unit of the state's.
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
        d_w_hh, d_b_hh = rows.t() @ factors[:-1].flatten(0, 1), rows.sum(0)
        d_w_ih, d_b_ih = torch.empty_like(w_ih), torch.cat((d_b_hh[:gates], rows_n.sum(0)))
        torch.mm(rows_rz.t(), x_rows, out=d_w_ih[:gates])
        torch.mm(rows_n.t(), x_rows, out=d_w_ih[gates:])
        d_x = torch.addmm(rows_rz @ w_ih[:gates], rows_n, w_ih[gates:]).view_as(x) if ctx.needs_input_grad[0] else None
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
