"""The kernels that torch requests from cuDNN for a run's recurrent layers in fp16, on a GPU such as A100 and H100.

Source: aten/src/ATen/native/cudnn/RNN.cpp of torch 2.11 to 2.13, `use_rnn_persist_small_h`,
`use_persist_common_heuristics` and `use_persist_device_heuristics`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One call of torch.lstm or torch.gru with padded input."""

    rnn: str
    input_size: int
    hidden_size: int
    num_layers: int
    rows: int

    def has_resident_kernel(self) -> bool:
        """Whether the recurrent matrix stays in registers from one time step to the next."""
        if self.hidden_size <= 128:  # 192 in the forward pass
            return True
        fits = self.num_layers == 1 and self.hidden_size <= 1024
        aligned = self.hidden_size % 128 == self.input_size % 128 == 0
        return fits and aligned and self.rnn == "LSTM" and self.rows % 8 == 0 and self.rows <= 128


def training_calls(config, processes=1):
    """The calls of a micro-batch in training."""
    model = config.model
    rows = config.data.batch_size // (processes * config.train.accumulation_steps)
    separate = model.layer_norm or model.dropout > 0 or model.num_layers == 1
    inputs = [model.embedding_dim] + [model.hidden_dim] * (model.num_layers - 1) if separate else [model.embedding_dim]
    return [Call(model.rnn, size, model.hidden_dim, 1 if separate else model.num_layers, rows) for size in inputs]
