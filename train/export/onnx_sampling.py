"""The part of the graph that samples: charrnn.sampling's rules with options per row, and the loop that feeds back.

Letters: B batch, N characters generated, V vocabulary size, K largest top_k of the rows.
"""

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from train.export.graph_builder import GraphBuilder, branch, int64, optional_tensor, tensor
from train.export.onnx_network import Network

# The options by name, with their element types.
_OPTIONS = {
    "temperature": TensorProto.DOUBLE,
    "top_k": TensorProto.INT64,
    "top_p": TensorProto.DOUBLE,
    "min_p": TensorProto.DOUBLE,
}


def inputs() -> list[onnx.ValueInfoProto]:
    """The graph's optional inputs: random numbers (B, N), and the options, one per row."""
    options = [optional_tensor(name, kind, ["B"]) for name, kind in _OPTIONS.items()]
    return [optional_tensor("uniforms", TensorProto.DOUBLE, ["B", "N"]), *options]


def generate(op: GraphBuilder, network: Network, logits: str, state: Sequence[str]) -> tuple[str, list[str]]:
    """Generate N characters after logits (B, T, V) and the state there.

    The loop stands in the main graph, and not in a branch for N above 0: two levels deep onnxruntime (1.32) leaves
    quantized matrices unpacked, and runs 15 times slower.

    Returns:
        ids (B, N), and the state before the last of them.
    """
    rows = op.Shape("ids", start=0, end=1)  # (1,)
    last = op.Gather(logits, "minus_1", axis=1)  # (B, V)
    uniforms = _read_options(op, last)
    num_drawn = op.Gather(op.Shape(uniforms, start=1, end=2), "zero")
    by_time = op.Transpose(op.Unsqueeze(uniforms, "axis_2"), perm=[1, 0, 2])  # (N, B, 1)

    def first(inner: GraphBuilder) -> list[str]:
        drawn = _sample(inner, "first_", last, inner.Gather(by_time, "zero", axis=0))
        return [inner.Unsqueeze(drawn, "axis_0")]

    def none(inner: GraphBuilder) -> list[str]:
        zero = helper.make_tensor("value", TensorProto.INT64, [1], [0])
        return [inner.ConstantOfShape(inner.Concat("axis_0", rows, axis=0), value=zero)]

    ids_type = (TensorProto.INT64, [None, "B"])
    id_0 = op.If(  # (1, B), or (0, B) for N = 0
        op.Greater(num_drawn, "zero"),
        then_branch=branch("first_", first, ids_type),
        else_branch=branch("none_", none, ids_type),
    )
    rest = op.Max(op.Sub(num_drawn, "one"), "zero")
    op.Slice(by_time, "axis_1", "int64_max", name="rest_of_uniforms")  # (N - 1, B, 1)
    start = op.Reshape(id_0, "minus_1s")  # (B,), or empty for the loop that runs no iteration
    carried = [start, *state, *_quantized_states(op, network, state)]
    body = _loop_body(network, len(state), len(carried) - len(state) - 1)
    loop = op.multiple("Loop", [rest, "true", *carried], len(carried) + 1, body=body)
    # Without iterations the loop does not know B.
    shape = op.Concat(op.Reshape(rest, "minus_1s"), rows, axis=0)
    ids = op.Concat(id_0, op.Reshape(loop[-1], shape, allowzero=1), axis=0)  # (N, B)
    return op.Transpose(ids, perm=[1, 0]), loop[1 : len(state) + 1]


def _read_options(op: GraphBuilder, last: str) -> str:
    """Prepare what is the same for every character of a call. last: (B, V). Returns the uniforms, (B, N)."""
    uniforms, *options = op.multiple(
        "If",
        [op.OptionalHasElement("uniforms")],
        1 + len(_OPTIONS),
        then_branch=branch("given_", _given, *_option_types()),
        else_branch=branch("plain_", _defaults, *_option_types()),
    )
    temperature, top_k, _, _ = (
        op.Unsqueeze(value, "axis_1", name=f"{name}_of_row") for name, value in zip(_OPTIONS, options, strict=True)
    )  # each (B, 1), or (1, 1) for a default
    kept = op.Where(op.Greater(top_k, "zero"), op.Min(top_k, "all_symbols"), "all_symbols")
    largest = op.ReduceMax(kept, keepdims=0)
    op.Reshape(largest, "minus_1s", name="kept_symbols")  # (1,), K
    op.Less(op.Slice("ranks", "axis_0", "kept_symbols", "axis_1"), kept, name="is_in_top_k")  # (B, K)
    op.GreaterOrEqual("top_p_of_row", "one_f64", name="is_whole")
    has_top_p = op.Less(op.ReduceMin("top_p_of_row", keepdims=0), "one_f64")
    has_min_p = op.Greater(op.ReduceMax("min_p_of_row", keepdims=0), "zero_f64")
    is_mixed = op.Less(op.ReduceMin(kept, keepdims=0), largest)
    op.Or(op.Or(has_top_p, has_min_p), is_mixed, name="is_cut")
    op.And(op.Less(largest, "all_symbols"), op.Not("is_cut"), name="is_top_k_alone")
    # Logits are float32: divided by this they stay finite, and the distribution is that of any lower temperature.
    op.Max(temperature, "least_temperature", name="safe_temperature")
    # (B, V) of -inf: of a shape that no input can make larger than the logits.
    op.Where(op.Greater(last, last), last, "minus_infinity", name="nothing")
    return uniforms


def _option_types() -> list[tuple[int, None]]:
    return [(TensorProto.DOUBLE, None), *((kind, None) for kind in _OPTIONS.values())]


def _given(op: GraphBuilder) -> list[str]:
    """The uniforms, and each option that was given."""
    found = [op.OptionalGetElement("uniforms")]
    for name, kind in _OPTIONS.items():
        given, default = GraphBuilder(f"{name}_given_"), GraphBuilder(f"{name}_default_")
        taken, left_out = given.OptionalGetElement(name), default.Identity(f"default_{name}")
        found.append(
            op.If(
                op.OptionalHasElement(name),
                then_branch=given.graph([], [tensor(taken, kind, None)]),
                else_branch=default.graph([], [tensor(left_out, kind, None)]),
            )
        )
    return found


def _defaults(op: GraphBuilder) -> list[str]:
    return [op.Identity(f"default_{name}") for name in ("uniforms", *_OPTIONS)]


def _sample(op: GraphBuilder, prefix: str, logits: str, uniforms: str) -> str:
    """Sample by charrnn.sampling's rules. logits: (B, V), uniforms: (B, 1) float64. Returns (B,) int64."""
    float_type = (TensorProto.FLOAT, ["B", None])

    def top_k_alone(inner: GraphBuilder) -> list[str]:
        values, order = inner.multiple("TopK", [logits, "kept_symbols"], 2, axis=1, sorted=0)  # (B, K)
        return [inner.ScatterElements("nothing", order, values, axis=1)]

    def others(inner: GraphBuilder) -> list[str]:
        cut = branch(f"{prefix}cut_", lambda deep: [_cut(deep, logits)], float_type)
        every = branch(f"{prefix}every_", lambda deep: [deep.Identity(logits)], float_type)
        return [inner.If("is_cut", then_branch=cut, else_branch=every)]

    kept = op.If(  # (B, V), -inf for what is not kept; one top_k for all rows, the common case, takes one If
        "is_top_k_alone",
        then_branch=branch(f"{prefix}top_k_", top_k_alone, float_type),
        else_branch=branch(f"{prefix}others_", others, float_type),
    )
    wide = op.Cast(kept, to=TensorProto.DOUBLE)
    shares = op.Softmax(op.Div(wide, "safe_temperature"), axis=1)
    cumulative = op.CumSum(shares, "one")  # (B, V)
    target = op.Mul(uniforms, op.Gather(cumulative, "minus_1s", axis=1))  # (B, 1)
    # The first character whose end lies beyond the target; of NaN it is 0, which the engine finds out later.
    beyond = op.Cast(op.Greater(cumulative, target), to=TensorProto.UINT8)
    return op.ArgMax(beyond, axis=1, keepdims=0)


def _cut(op: GraphBuilder, logits: str) -> str:
    """The logits (B, V) that each row's top-k, top-p and min-p keep; the rest is -inf."""
    ranked, order = op.multiple("TopK", [logits, "kept_symbols"], 2, axis=1)  # (B, K), the likeliest first
    ranked = op.Where("is_in_top_k", ranked, "minus_infinity")
    wide = op.Cast(ranked, to=TensorProto.DOUBLE)
    shifted = op.Sub(wide, op.Gather(wide, "axis_0", axis=1))
    shares = op.Exp(op.Div(shifted, "temperature_of_row"))  # (B, K), the likeliest has 1
    before = op.CumSum(shares, "one", exclusive=1)
    # Summed in the order of the ranks, a row's total does not depend on the other rows' K.
    total = op.Gather(op.CumSum(shares, "one"), "minus_1s", axis=1)  # (B, 1)
    # With top_p 1 rounding must not drop the last ones.
    inside = op.Or(op.Less(before, op.Mul(total, "top_p_of_row")), "is_whole")
    inside = op.And(inside, op.GreaterOrEqual(shares, "min_p_of_row"))
    values = op.Where(inside, ranked, "minus_infinity")
    return op.ScatterElements("nothing", order, values, axis=1)


def _quantized_states(op: GraphBuilder, network: Network, state: Sequence[str]) -> list[str]:
    """Each layer's h in 8 bits, (B, H), which the loop carries so as to round it once; none in fp32."""
    return [network.quantized(op, h) for h in state[:: len(network.states)]] if network.is_int8 else []


def _loop_body(network: Network, num_parts: int, num_quantized: int) -> onnx.GraphProto:
    """Feed a character to the network and samples the next."""
    op = GraphBuilder("loop_")
    before = [f"loop_state{i}" for i in range(num_parts)]
    quantized = [f"loop_quantized{i}" for i in range(num_quantized)]
    op.quantized = dict(zip(before[:: len(network.states)], quantized, strict=False))
    logits, after = network.step(op, "loop_ids", before)
    drawn = _sample(op, "loop_", logits, op.Gather("rest_of_uniforms", "loop_i", axis=0))  # (B,)
    op.Identity("loop_condition", name="loop_goes_on")
    shown = op.Identity(drawn)
    return op.graph(
        [
            int64("loop_i"),
            tensor("loop_condition", TensorProto.BOOL, []),
            int64("loop_ids", "B"),
            *map(network.layer_state, before),
            *map(network.layer_quantized, quantized),
        ],
        [
            tensor("loop_goes_on", TensorProto.BOOL, []),
            int64(drawn, "B"),
            *map(network.layer_state, after),
            *map(network.layer_quantized, _quantized_states(op, network, after)),
            int64(shown, "B"),
        ],
    )
