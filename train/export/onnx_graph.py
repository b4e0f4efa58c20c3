"""The exported model as one ONNX graph; docs/model-file.md specifies it."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from charrnn import __version__
from charrnn.config import ModelConfig
from charrnn.vocab import Vocab
from train.export import onnx_sampling
from train.export.graph_builder import GraphBuilder, float32, int64, values_read
from train.export.onnx_network import CONTRIB, Network
from train.export.quantize import Precision
from train.export.weights import Weights

# An old opset and file version run in more runtimes.
_OPSET = 17
_IR_VERSION = 8


def build_onnx(
    config: ModelConfig, vocab: Vocab, folded: Weights, metadata: dict[str, str], precision: Precision = "fp32"
) -> onnx.ModelProto:
    """Return the model as an ONNX graph with every weight inside, checked.

    Args:
        config: The network's shape.
        vocab: The vocabulary.
        folded: Of `train.export.weights.fold`.
        metadata: The file's metadata.
        precision: Of the matrices.
    """
    network = Network(config, vocab, folded, precision)
    op = GraphBuilder()
    logits, state = network.read(op, "ids", network.split_state(op))
    op.Identity(logits, name="logits")
    drawn, state = onnx_sampling.generate(op, network, logits, state)
    network.join_state(op, state)
    op.Identity(drawn, name="drawn")
    inputs = [int64("ids", "B", "T"), *network.state_tensors("{}"), *onnx_sampling.inputs()]
    outputs = [float32("logits", "B", "T", len(vocab)), *network.state_tensors("{}_next"), int64("drawn", "B", "N")]
    graph = op.graph(inputs, outputs)
    used = values_read(graph)
    graph.initializer.extend(
        numpy_helper.from_array(np.array(array, order="C"), name)
        for name, array in network.initializers.items()
        if name in used
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    if precision != "fp32":
        opsets.append(helper.make_opsetid(CONTRIB, 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    model.producer_name, model.producer_version = "charrnn", __version__
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model
