"""How nodes are joined in model files: written by `python tests/graph_forms.py` from files of every kind.

A line is: the graph, the operator's domain and name, what gives each of its inputs, how many outputs it has, and its
attributes. An input comes from a constant by its name, weights (with their element type), an input of the graph, or an
operator's output by its place; ^ marks what a graph takes from those around it, - an input that is left out. Digits
that count layers are #, and of inputs that come once a layer every kind is there once.
"""

FORMS = frozenset(
    """
main  Add(MatMul:0, head_bias f32) -> 1
main  Add(MatMul:0, input#_bias f32) -> 1
main  Add(MatMul:0, input0_bias f32) -> 1
main  Add(Mul:0, head_shift f32) -> 1
main  Add(Mul:0, input#_shift f32) -> 1
main  And(Less:0, Not:0) -> 1
main  Cast(Gather:0) -> 1 to=1
main  Concat(GRU:1) -> 1 axis=0
main  Concat(If:0, Reshape:0) -> 1 axis=0
main  Concat(LSTM:1) -> 1 axis=0
main  Concat(LSTM:2) -> 1 axis=0
main  Concat(Reshape:0, Shape:0) -> 1 axis=0
main  Concat(Shape:0, minus_1s) -> 1 axis=0
main  Concat(Unsqueeze:0) -> 1 axis=0
main  GRU(Gather:0, W# f32, R# f32, B# f32, -, Split:0) -> 2 linear_before_reset=1
main  GRU(Squeeze:0, W# f32, R# f32, B# f32, -, Split:1) -> 2 linear_before_reset=1
main  GRU(Squeeze:0, W# f32, R# f32, B# f32, -, Split:2) -> 2 linear_before_reset=1
main  GRU(Squeeze:0, W# f32, R# f32, B# f32, -, Split:3) -> 2 linear_before_reset=1
main  Gather(Reshape:0, minus_1) -> 1 axis=1
main  Gather(Shape:0, zero) -> 1
main  Gather(embedding f16, Reshape:0) -> 1
main  Gather(embedding f32, Reshape:0) -> 1
main  Gather(embedding f32, Transpose:0) -> 1
main  Gather(goes_on, Transpose:0) -> 1
main  Gather(table f16, Reshape:0) -> 1
main  Gather(table f32, Reshape:0) -> 1
main  Greater(Gather:0, Gather:0) -> 1
main  Greater(Gather:0, zero) -> 1
main  Greater(min_p, zero_f64) -> 1
main  Greater(top_k, zero) -> 1
main  GreaterOrEqual(top_p, one_f64) -> 1
main  Identity(Reshape:0) -> 1
main  Identity(Transpose:0) -> 1
main  If(Greater:0) -> 1 else_branch, then_branch
main  LSTM(Gather:0, W# f32, R# f32, B# f32, -, Split:0, Split:0) -> 3
main  LSTM(Squeeze:0, W# f32, R# f32, B# f32, -, Split:1, Split:1) -> 3
main  LSTM(Squeeze:0, W# f32, R# f32, B# f32, -, Split:2, Split:2) -> 3
main  LSTM(Squeeze:0, W# f32, R# f32, B# f32, -, Split:3, Split:3) -> 3
main  LayerNormalization(Reshape:0, one_gains) -> 3 axis=18446744073709551615, epsilon=925353388
main  Less(Where:0, all_symbols) -> 1
main  Loop(Max:0, true, QuantizeLinear:0, Reshape:0, Scan:0) -> L body
main  Loop(Max:0, true, QuantizeLinear:0, Reshape:0, Scan:0, Scan:1) -> L body
main  Loop(Max:0, true, Reshape:0, Scan:0) -> L body
main  Loop(Max:0, true, Reshape:0, Scan:0, Scan:1) -> L body
main  MatMul(Gather:0, input0 f32) -> 1
main  MatMul(Reshape:0, head f32) -> 1
main  MatMul(Reshape:0, input# f32) -> 1
main  MatMul(Transpose:0, head_weight f32) -> 1
main  Max(Sub:0, zero) -> 1
main  Max(temperature, least_temperature) -> 1
main  Min(top_k, all_symbols) -> 1
main  Mul(MatMul:0, LayerNormalization:2) -> 1
main  Mul(MatMulIntegerToFloat:0, head_scale f32) -> 1
main  Mul(MatMulIntegerToFloat:0, input#_scale f32) -> 1
main  Mul(MatMulNBits:0, LayerNormalization:2) -> 1
main  Mul(Mul:0, LayerNormalization:2) -> 1
main  Not(GreaterOrEqual:0) -> 1
main  Not(Or:0) -> 1
main  Or(Not:0, Greater:0) -> 1
main  QuantizeLinear(Reshape:0, state_scale, state_middle) -> 1
main  QuantizeLinear(Scan:0, state_scale, state_middle) -> 1
main  Reshape(Add:0, Concat:0) -> 1
main  Reshape(Cast:0, Concat:0) -> 1
main  Reshape(Gather:0, Concat:0) -> 1
main  Reshape(If:0, minus_1s) -> 1
main  Reshape(Loop:2, Concat:0) -> 1 allowzero=1
main  Reshape(Loop:3, Concat:0) -> 1 allowzero=1
main  Reshape(MatMulNBits:0, Concat:0) -> 1
main  Reshape(Max:0, minus_1s) -> 1
main  Reshape(Mul:0, Concat:0) -> 1
main  Reshape(Scan:1, minus_1_width) -> 1
main  Reshape(Scan:2, minus_1_width) -> 1
main  Reshape(Transpose:0, minus_1_width) -> 1
main  Reshape(Transpose:0, minus_1s) -> 1
main  Reshape(Where:0, minus_1s) -> 1
main  Scan(Squeeze:0, Reshape:0) -> 2 body, num_scan_inputs=1
main  Scan(Squeeze:0, Reshape:0, Gather:0) -> 2 body, num_scan_inputs=2
main  Scan(Squeeze:0, Squeeze:0, Reshape:0) -> 3 body, num_scan_inputs=1
main  Scan(Squeeze:0, Squeeze:0, Reshape:0, Gather:0) -> 3 body, num_scan_inputs=2
main  Shape(Transpose:0) -> 1
main  Shape(ids) -> 1
main  Shape(ids) -> 1 end=1, start=0
main  Shape(uniforms) -> 1 end=2, start=1
main  Slice(Transpose:0, axis_1, far) -> 1
main  Split(c, one_each) -> L axis=0
main  Split(h, one_each) -> L axis=0
main  Squeeze(GRU:0, axis_1) -> 1
main  Squeeze(LSTM:0, axis_1) -> 1
main  Squeeze(Split:0, axis_0) -> 1
main  Squeeze(Split:1, axis_0) -> 1
main  Squeeze(Split:2, axis_0) -> 1
main  Squeeze(Split:3, axis_0) -> 1
main  Sub(Gather:0, one) -> 1
main  Transpose(Concat:0) -> 1 perm=1 0
main  Transpose(Scan:1) -> 1 perm=1 0 2
main  Transpose(Scan:2) -> 1 perm=1 0 2
main  Transpose(Squeeze:0) -> 1 perm=1 0 2
main  Transpose(Unsqueeze:0) -> 1 perm=1 0 2
main  Transpose(ids) -> 1 perm=1 0
main  Unsqueeze(Loop:1, axis_0) -> 1
main  Unsqueeze(Loop:2, axis_0) -> 1
main  Unsqueeze(Loop:3, axis_0) -> 1
main  Unsqueeze(uniforms, axis_2) -> 1
main  Where(Greater:0, Gather:0, minus_infinity) -> 1
main  Where(Greater:0, Min:0, all_symbols) -> 1
main com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, head i8, state_scale, no_scale, state_middle) -> 1
main com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, head i8, state_scale, no_scale, state_middle, -, head_bias f32) -> 1
main com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, input# i8, state_scale, no_scale, state_middle) -> 1
main com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, input# i8, state_scale, no_scale, state_middle, -, input#_bias f32) -> 1
main com.microsoft MatMulNBits(Cast:0, input0 u8, input0_scale f32, -, -, input0_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main com.microsoft MatMulNBits(Cast:0, input0 u8, input0_scale f32, -, -, input0_bias f32) -> 1 accuracy_level=4, bits=8, block_size=32
main com.microsoft MatMulNBits(Reshape:0, head u8, head_scale f32) -> 1 accuracy_level=4, bits=4, block_size=32
main com.microsoft MatMulNBits(Reshape:0, head u8, head_scale f32, -, -, head_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main com.microsoft MatMulNBits(Reshape:0, input# u8, input#_scale f32) -> 1 accuracy_level=4, bits=4, block_size=32
main com.microsoft MatMulNBits(Reshape:0, input# u8, input#_scale f32, -, -, input#_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main gives Add:0, Concat:0
main gives Add:0, Concat:0, Concat:0
main gives Identity:0, Concat:0, Concat:0, Identity:0
main gives Identity:0, Concat:0, Identity:0
main/If.else_branch  Concat(^axis_0, ^Shape:0) -> 1 axis=0
main/If.else_branch  ConstantOfShape(Concat:0) -> 1 value=7:1:0
main/If.else_branch gives ConstantOfShape:0
main/If.then_branch  ArgMax(Cast:0) -> 1 axis=1, keepdims=0
main/If.then_branch  Cast(Greater:0) -> 1 to=2
main/If.then_branch  Cast(If:0) -> 1 to=11
main/If.then_branch  CumSum(Softmax:0, ^one) -> 1
main/If.then_branch  Div(Cast:0, ^Max:0) -> 1
main/If.then_branch  Gather(CumSum:0, ^minus_1s) -> 1 axis=1
main/If.then_branch  Gather(^Transpose:0, ^zero) -> 1 axis=0
main/If.then_branch  Greater(CumSum:0, Mul:0) -> 1
main/If.then_branch  If(^And:0) -> 1 else_branch, then_branch
main/If.then_branch  Mul(Gather:0, Gather:0) -> 1
main/If.then_branch  Softmax(Div:0) -> 1 axis=1
main/If.then_branch  Unsqueeze(ArgMax:0, ^axis_0) -> 1
main/If.then_branch gives Unsqueeze:0
main/If.then_branch/If.else_branch  If(^Or:0) -> 1 else_branch, then_branch
main/If.then_branch/If.else_branch gives If:0
main/If.then_branch/If.else_branch/If.else_branch  Identity(^Gather:0) -> 1
main/If.then_branch/If.else_branch/If.else_branch gives Identity:0
main/If.then_branch/If.else_branch/If.then_branch  And(Or:0, GreaterOrEqual:0) -> 1
main/If.then_branch/If.else_branch/If.then_branch  Cast(TopK:0) -> 1 to=11
main/If.then_branch/If.else_branch/If.then_branch  CumSum(Exp:0, ^one) -> 1 exclusive=1
main/If.then_branch/If.else_branch/If.then_branch  Div(Sub:0, ^temperature) -> 1
main/If.then_branch/If.else_branch/If.then_branch  Exp(Div:0) -> 1
main/If.then_branch/If.else_branch/If.then_branch  Gather(Cast:0, ^axis_0) -> 1 axis=1
main/If.then_branch/If.else_branch/If.then_branch  GreaterOrEqual(Exp:0, ^min_p) -> 1
main/If.then_branch/If.else_branch/If.then_branch  Less(CumSum:0, Mul:0) -> 1
main/If.then_branch/If.else_branch/If.then_branch  Mul(ReduceSum:0, ^top_p) -> 1
main/If.then_branch/If.else_branch/If.then_branch  Or(Less:0, ^GreaterOrEqual:0) -> 1
main/If.then_branch/If.else_branch/If.then_branch  ReduceSum(Exp:0, ^axis_1) -> 1 keepdims=1
main/If.then_branch/If.else_branch/If.then_branch  ScatterElements(^Where:0, TopK:1, Where:0) -> 1 axis=1
main/If.then_branch/If.else_branch/If.then_branch  Sub(Cast:0, Gather:0) -> 1
main/If.then_branch/If.else_branch/If.then_branch  TopK(^Gather:0, ^Reshape:0) -> 2 axis=1
main/If.then_branch/If.else_branch/If.then_branch  Where(And:0, TopK:0, ^minus_infinity) -> 1
main/If.then_branch/If.else_branch/If.then_branch gives ScatterElements:0
main/If.then_branch/If.then_branch  ScatterElements(^Where:0, TopK:1, TopK:0) -> 1 axis=1
main/If.then_branch/If.then_branch  TopK(^Gather:0, ^Reshape:0) -> 2 axis=1, sorted=0
main/If.then_branch/If.then_branch gives ScatterElements:0
main/Loop.body  Add(Add:0, Add:0) -> 1
main/Loop.body  Add(Add:0, MatMulNBits:0) -> 1
main/Loop.body  Add(Add:0, Mul:0) -> 1
main/Loop.body  Add(Cast:0, MatMulNBits:0) -> 1
main/Loop.body  Add(Cast:0, Mul:0) -> 1
main/Loop.body  Add(Gather:0, Add:0) -> 1
main/Loop.body  Add(MatMul:0, ^head_bias f32) -> 1
main/Loop.body  Add(MatMul:0, ^input#_bias f32) -> 1
main/Loop.body  Add(MatMul:0, ^input0_bias f32) -> 1
main/Loop.body  Add(MatMul:0, ^recurrent#_bias f32) -> 1
main/Loop.body  Add(MatMulNBits:0, MatMulNBits:0) -> 1
main/Loop.body  Add(MatMulNBits:0, Mul:0) -> 1
main/Loop.body  Add(Mul:0, Mul:0) -> 1
main/Loop.body  Add(Mul:0, ^head_shift f32) -> 1
main/Loop.body  Add(Mul:0, ^input#_shift f32) -> 1
main/Loop.body  Add(Split:0, Split:0) -> 1
main/Loop.body  Add(Split:1, Mul:0) -> 1
main/Loop.body  Add(Tanh:0, Mul:0) -> 1
main/Loop.body  ArgMax(Cast:0) -> 1 axis=1, keepdims=0
main/Loop.body  Cast(Gather:0) -> 1 to=1
main/Loop.body  Cast(Greater:0) -> 1 to=2
main/Loop.body  Cast(If:0) -> 1 to=11
main/Loop.body  CumSum(Softmax:0, ^one) -> 1
main/Loop.body  Div(Cast:0, ^Max:0) -> 1
main/Loop.body  Gather(CumSum:0, ^minus_1s) -> 1 axis=1
main/Loop.body  Gather(^Slice:0, loop_i) -> 1 axis=0
main/Loop.body  Gather(^embedding f16, loop_ids) -> 1
main/Loop.body  Gather(^embedding f32, loop_ids) -> 1
main/Loop.body  Gather(^goes_on, loop_ids) -> 1
main/Loop.body  Gather(^table f16, loop_ids) -> 1
main/Loop.body  Gather(^table f32, loop_ids) -> 1
main/Loop.body  Greater(CumSum:0, Mul:0) -> 1
main/Loop.body  Identity(ArgMax:0) -> 1
main/Loop.body  Identity(loop_condition) -> 1
main/Loop.body  If(^And:0) -> 1 else_branch, then_branch
main/Loop.body  LayerNormalization(Add:0, ^one_gains) -> 3 axis=18446744073709551615, epsilon=925353388
main/Loop.body  LayerNormalization(Mul:0, ^one_gains) -> 3 axis=18446744073709551615, epsilon=925353388
main/Loop.body  MatMul(Add:0, ^head f32) -> 1
main/Loop.body  MatMul(Add:0, ^input# f32) -> 1
main/Loop.body  MatMul(Gather:0, ^input0 f32) -> 1
main/Loop.body  MatMul(Mul:0, ^head f32) -> 1
main/Loop.body  MatMul(Mul:0, ^input# f32) -> 1
main/Loop.body  MatMul(Mul:0, ^recurrent# f32) -> 1
main/Loop.body  MatMul(loop_state#, ^recurrent# f32) -> 1
main/Loop.body  Mul(Gather:0, Gather:0) -> 1
main/Loop.body  Mul(MatMul:0, LayerNormalization:2) -> 1
main/Loop.body  Mul(MatMulIntegerToFloat:0, ^head_scale f32) -> 1
main/Loop.body  Mul(MatMulIntegerToFloat:0, ^input#_scale f32) -> 1
main/Loop.body  Mul(MatMulIntegerToFloat:0, ^recurrent#_scale f32) -> 1
main/Loop.body  Mul(MatMulNBits:0, LayerNormalization:2) -> 1
main/Loop.body  Mul(Mul:0, LayerNormalization:2) -> 1
main/Loop.body  Mul(Split:0, Split:1) -> 1
main/Loop.body  Mul(Split:0, Tanh:0) -> 1
main/Loop.body  Mul(Split:1, Mul:0) -> 1
main/Loop.body  Mul(Split:1, Sub:0) -> 1
main/Loop.body  Mul(Split:1, loop_state#) -> 1
main/Loop.body  Mul(Split:2, Tanh:0) -> 1
main/Loop.body  Mul(loop_state#, Gather:0) -> 1
main/Loop.body  QuantizeLinear(Add:0, ^state_scale, ^state_middle) -> 1
main/Loop.body  QuantizeLinear(Mul:0, ^state_scale, ^state_middle) -> 1
main/Loop.body  Sigmoid(Add:0) -> 1
main/Loop.body  Sigmoid(Split:0) -> 1
main/Loop.body  Softmax(Div:0) -> 1 axis=1
main/Loop.body  Split(Add:0, ^switches_candidate) -> 2 axis=1
main/Loop.body  Split(Cast:0, ^switches_candidate) -> 2 axis=1
main/Loop.body  Split(Gather:0, ^switches_candidate) -> 2 axis=1
main/Loop.body  Split(MatMulNBits:0, ^switches_candidate) -> 2 axis=1
main/Loop.body  Split(Mul:0, ^switches_candidate) -> 2 axis=1
main/Loop.body  Split(Sigmoid:0, ^three_widths) -> 3 axis=1
main/Loop.body  Split(Sigmoid:0, ^two_widths) -> 2 axis=1
main/Loop.body  Sub(Mul:0, Tanh:0) -> 1
main/Loop.body  Sub(loop_state#, Tanh:0) -> 1
main/Loop.body  Tanh(Add:0) -> 1
main/Loop.body  Tanh(Split:1) -> 1
main/Loop.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^head i8, ^state_scale, ^no_scale, ^state_middle) -> 1
main/Loop.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^head i8, ^state_scale, ^no_scale, ^state_middle, -, ^head_bias f32) -> 1
main/Loop.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^input# i8, ^state_scale, ^no_scale, ^state_middle) -> 1
main/Loop.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^input# i8, ^state_scale, ^no_scale, ^state_middle, -, ^input#_bias f32) -> 1
main/Loop.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^recurrent# i8, ^state_scale, ^no_scale, ^state_middle, -, ^recurrent#_bias f32) -> 1
main/Loop.body com.microsoft MatMulIntegerToFloat(loop_steps#, ^recurrent# i8, ^state_scale, ^no_scale, ^state_middle, -, ^recurrent#_bias f32) -> 1
main/Loop.body com.microsoft MatMulNBits(Add:0, ^head u8, ^head_scale f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(Add:0, ^head u8, ^head_scale f32, -, -, ^head_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(Add:0, ^input# u8, ^input#_scale f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(Add:0, ^input# u8, ^input#_scale f32, -, -, ^input#_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(Cast:0, ^input0 u8, ^input0_scale f32, -, -, ^input0_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(Cast:0, ^input0 u8, ^input0_scale f32, -, -, ^input0_bias f32) -> 1 accuracy_level=4, bits=8, block_size=32
main/Loop.body com.microsoft MatMulNBits(Mul:0, ^head u8, ^head_scale f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(Mul:0, ^head u8, ^head_scale f32, -, -, ^head_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(Mul:0, ^input# u8, ^input#_scale f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(Mul:0, ^input# u8, ^input#_scale f32, -, -, ^input#_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(Mul:0, ^recurrent# u8, ^recurrent#_scale f32, -, -, ^recurrent#_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body com.microsoft MatMulNBits(loop_state#, ^recurrent# u8, ^recurrent#_scale f32, -, -, ^recurrent#_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Loop.body gives Identity:0, ArgMax:0, Add:0, Identity:0
main/Loop.body gives Identity:0, ArgMax:0, Add:0, Identity:0, Mul:0
main/Loop.body gives Identity:0, ArgMax:0, Add:0, Identity:0, Mul:0, QuantizeLinear:0
main/Loop.body gives Identity:0, ArgMax:0, Add:0, Identity:0, QuantizeLinear:0
main/Loop.body/If.else_branch  If(^Or:0) -> 1 else_branch, then_branch
main/Loop.body/If.else_branch gives If:0
main/Loop.body/If.else_branch/If.else_branch  Identity(^Add:0) -> 1
main/Loop.body/If.else_branch/If.else_branch  Identity(^MatMulNBits:0) -> 1
main/Loop.body/If.else_branch/If.else_branch  Identity(^Mul:0) -> 1
main/Loop.body/If.else_branch/If.else_branch gives Identity:0
main/Loop.body/If.else_branch/If.then_branch  And(Or:0, GreaterOrEqual:0) -> 1
main/Loop.body/If.else_branch/If.then_branch  Cast(TopK:0) -> 1 to=11
main/Loop.body/If.else_branch/If.then_branch  CumSum(Exp:0, ^one) -> 1 exclusive=1
main/Loop.body/If.else_branch/If.then_branch  Div(Sub:0, ^temperature) -> 1
main/Loop.body/If.else_branch/If.then_branch  Exp(Div:0) -> 1
main/Loop.body/If.else_branch/If.then_branch  Gather(Cast:0, ^axis_0) -> 1 axis=1
main/Loop.body/If.else_branch/If.then_branch  GreaterOrEqual(Exp:0, ^min_p) -> 1
main/Loop.body/If.else_branch/If.then_branch  Less(CumSum:0, Mul:0) -> 1
main/Loop.body/If.else_branch/If.then_branch  Mul(ReduceSum:0, ^top_p) -> 1
main/Loop.body/If.else_branch/If.then_branch  Or(Less:0, ^GreaterOrEqual:0) -> 1
main/Loop.body/If.else_branch/If.then_branch  ReduceSum(Exp:0, ^axis_1) -> 1 keepdims=1
main/Loop.body/If.else_branch/If.then_branch  ScatterElements(^Where:0, TopK:1, Where:0) -> 1 axis=1
main/Loop.body/If.else_branch/If.then_branch  Sub(Cast:0, Gather:0) -> 1
main/Loop.body/If.else_branch/If.then_branch  TopK(^Add:0, ^Reshape:0) -> 2 axis=1
main/Loop.body/If.else_branch/If.then_branch  TopK(^MatMulNBits:0, ^Reshape:0) -> 2 axis=1
main/Loop.body/If.else_branch/If.then_branch  TopK(^Mul:0, ^Reshape:0) -> 2 axis=1
main/Loop.body/If.else_branch/If.then_branch  Where(And:0, TopK:0, ^minus_infinity) -> 1
main/Loop.body/If.else_branch/If.then_branch gives ScatterElements:0
main/Loop.body/If.then_branch  ScatterElements(^Where:0, TopK:1, TopK:0) -> 1 axis=1
main/Loop.body/If.then_branch  TopK(^Add:0, ^Reshape:0) -> 2 axis=1, sorted=0
main/Loop.body/If.then_branch  TopK(^MatMulNBits:0, ^Reshape:0) -> 2 axis=1, sorted=0
main/Loop.body/If.then_branch  TopK(^Mul:0, ^Reshape:0) -> 2 axis=1, sorted=0
main/Loop.body/If.then_branch gives ScatterElements:0
main/Scan.body  Add(MatMul:0, ^recurrent#_bias f32) -> 1
main/Scan.body  Add(Mul:0, Mul:0) -> 1
main/Scan.body  Add(Split:0, Split:0) -> 1
main/Scan.body  Add(Split:1, Mul:0) -> 1
main/Scan.body  Add(Tanh:0, Mul:0) -> 1
main/Scan.body  Add(layer#_gates, Add:0) -> 1
main/Scan.body  Add(layer#_gates, MatMulNBits:0) -> 1
main/Scan.body  Add(layer#_gates, Mul:0) -> 1
main/Scan.body  Identity(Add:0) -> 1
main/Scan.body  Identity(Mul:0) -> 1
main/Scan.body  MatMul(Mul:0, ^recurrent# f32) -> 1
main/Scan.body  MatMul(layer#_h, ^recurrent# f32) -> 1
main/Scan.body  Mul(MatMulIntegerToFloat:0, ^recurrent#_scale f32) -> 1
main/Scan.body  Mul(Split:0, Split:1) -> 1
main/Scan.body  Mul(Split:0, Tanh:0) -> 1
main/Scan.body  Mul(Split:1, Mul:0) -> 1
main/Scan.body  Mul(Split:1, Sub:0) -> 1
main/Scan.body  Mul(Split:1, layer#_c) -> 1
main/Scan.body  Mul(Split:2, Tanh:0) -> 1
main/Scan.body  Mul(layer#_c, layer#_goes_on) -> 1
main/Scan.body  Mul(layer#_h, layer#_goes_on) -> 1
main/Scan.body  QuantizeLinear(Mul:0, ^state_scale, ^state_middle) -> 1
main/Scan.body  QuantizeLinear(layer#_h, ^state_scale, ^state_middle) -> 1
main/Scan.body  Sigmoid(Add:0) -> 1
main/Scan.body  Sigmoid(Split:0) -> 1
main/Scan.body  Split(Add:0, ^switches_candidate) -> 2 axis=1
main/Scan.body  Split(MatMulNBits:0, ^switches_candidate) -> 2 axis=1
main/Scan.body  Split(Mul:0, ^switches_candidate) -> 2 axis=1
main/Scan.body  Split(Sigmoid:0, ^three_widths) -> 3 axis=1
main/Scan.body  Split(Sigmoid:0, ^two_widths) -> 2 axis=1
main/Scan.body  Split(layer#_gates, ^switches_candidate) -> 2 axis=1
main/Scan.body  Sub(Mul:0, Tanh:0) -> 1
main/Scan.body  Sub(layer#_h, Tanh:0) -> 1
main/Scan.body  Tanh(Add:0) -> 1
main/Scan.body  Tanh(Split:1) -> 1
main/Scan.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^recurrent# i8, ^state_scale, ^no_scale, ^state_middle, -, ^recurrent#_bias f32) -> 1
main/Scan.body com.microsoft MatMulNBits(Mul:0, ^recurrent# u8, ^recurrent#_scale f32, -, -, ^recurrent#_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Scan.body com.microsoft MatMulNBits(layer#_h, ^recurrent# u8, ^recurrent#_scale f32, -, -, ^recurrent#_bias f32) -> 1 accuracy_level=4, bits=4, block_size=32
main/Scan.body gives Add:0, Identity:0
main/Scan.body gives Mul:0, Add:0, Identity:0
""".strip().splitlines()
)
# Of files that earlier states of train/export/onnx_graph.py wrote, in format version 2.
EARLIER = frozenset(
    """
main  Cast(Greater:0) -> 1 to=11
main  Or(Less:0, Or:0) -> 1
main  Reshape(MatMulIntegerToFloat:0, Concat:0) -> 1
main com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, head i8, state_scale, head_scale f32, state_middle, -, head_bias f32) -> 1
main com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, input# i8, state_scale, input#_scale f32, state_middle, -, input#_bias f32) -> 1
main/If.then_branch  CumSum(If:0, ^one) -> 1
main/If.then_branch  If(^Or:0) -> 1 else_branch, then_branch
main/If.then_branch/If.else_branch  Cast(^Gather:0) -> 1 to=11
main/If.then_branch/If.else_branch  Div(Cast:0, ^temperature) -> 1
main/If.then_branch/If.else_branch  Softmax(Div:0) -> 1 axis=1
main/If.then_branch/If.else_branch gives Softmax:0
main/If.then_branch/If.then_branch  Cast(TopK:0) -> 1 to=11
main/If.then_branch/If.then_branch  Div(Sub:0, ^temperature) -> 1
main/If.then_branch/If.then_branch  Exp(Div:0) -> 1
main/If.then_branch/If.then_branch  Gather(Cast:0, ^axis_0) -> 1 axis=1
main/If.then_branch/If.then_branch  If(^Or:0) -> 1 else_branch, then_branch
main/If.then_branch/If.then_branch  ScatterElements(^Cast:0, TopK:1, If:0) -> 1 axis=1
main/If.then_branch/If.then_branch  Sub(Cast:0, Gather:0) -> 1
main/If.then_branch/If.then_branch  TopK(^Gather:0, ^Reshape:0) -> 2 axis=1
main/If.then_branch/If.then_branch/If.else_branch  Identity(^Exp:0) -> 1
main/If.then_branch/If.then_branch/If.else_branch gives Identity:0
main/If.then_branch/If.then_branch/If.then_branch  And(Or:0, GreaterOrEqual:0) -> 1
main/If.then_branch/If.then_branch/If.then_branch  CumSum(^Exp:0, ^one) -> 1 exclusive=1
main/If.then_branch/If.then_branch/If.then_branch  GreaterOrEqual(^Exp:0, ^min_p) -> 1
main/If.then_branch/If.then_branch/If.then_branch  Less(CumSum:0, Mul:0) -> 1
main/If.then_branch/If.then_branch/If.then_branch  Mul(ReduceSum:0, ^top_p) -> 1
main/If.then_branch/If.then_branch/If.then_branch  Or(Less:0, ^GreaterOrEqual:0) -> 1
main/If.then_branch/If.then_branch/If.then_branch  ReduceSum(^Exp:0, ^axis_1) -> 1 keepdims=1
main/If.then_branch/If.then_branch/If.then_branch  Where(And:0, ^Exp:0, ^zero_f64) -> 1
main/If.then_branch/If.then_branch/If.then_branch gives Where:0
main/Loop.body  Add(Cast:0, MatMulIntegerToFloat:0) -> 1
main/Loop.body  Add(MatMulIntegerToFloat:0, MatMulIntegerToFloat:0) -> 1
main/Loop.body  Add(MatMulNBits:0, MatMulIntegerToFloat:0) -> 1
main/Loop.body  CumSum(If:0, ^one) -> 1
main/Loop.body  If(^Or:0) -> 1 else_branch, then_branch
main/Loop.body  QuantizeLinear(loop_state#, ^state_scale, ^state_middle) -> 1
main/Loop.body  Split(MatMulIntegerToFloat:0, ^switches_candidate) -> 2 axis=1
main/Loop.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^head i8, ^state_scale, ^head_scale f32, ^state_middle, -, ^head_bias f32) -> 1
main/Loop.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^input# i8, ^state_scale, ^input#_scale f32, ^state_middle, -, ^input#_bias f32) -> 1
main/Loop.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^recurrent# i8, ^state_scale, ^recurrent#_scale f32, ^state_middle, -, ^recurrent#_bias f32) -> 1
main/Loop.body/If.else_branch  Cast(^Add:0) -> 1 to=11
main/Loop.body/If.else_branch  Cast(^MatMulIntegerToFloat:0) -> 1 to=11
main/Loop.body/If.else_branch  Cast(^MatMulNBits:0) -> 1 to=11
main/Loop.body/If.else_branch  Div(Cast:0, ^temperature) -> 1
main/Loop.body/If.else_branch  Softmax(Div:0) -> 1 axis=1
main/Loop.body/If.else_branch gives Softmax:0
main/Loop.body/If.else_branch/If.else_branch  Identity(^MatMulIntegerToFloat:0) -> 1
main/Loop.body/If.else_branch/If.then_branch  TopK(^MatMulIntegerToFloat:0, ^Reshape:0) -> 2 axis=1
main/Loop.body/If.then_branch  Cast(TopK:0) -> 1 to=11
main/Loop.body/If.then_branch  Div(Sub:0, ^temperature) -> 1
main/Loop.body/If.then_branch  Exp(Div:0) -> 1
main/Loop.body/If.then_branch  Gather(Cast:0, ^axis_0) -> 1 axis=1
main/Loop.body/If.then_branch  If(^Or:0) -> 1 else_branch, then_branch
main/Loop.body/If.then_branch  ScatterElements(^Cast:0, TopK:1, If:0) -> 1 axis=1
main/Loop.body/If.then_branch  Sub(Cast:0, Gather:0) -> 1
main/Loop.body/If.then_branch  TopK(^Add:0, ^Reshape:0) -> 2 axis=1
main/Loop.body/If.then_branch  TopK(^MatMulIntegerToFloat:0, ^Reshape:0) -> 2 axis=1
main/Loop.body/If.then_branch  TopK(^MatMulIntegerToFloat:0, ^Reshape:0) -> 2 axis=1, sorted=0
main/Loop.body/If.then_branch  TopK(^MatMulNBits:0, ^Reshape:0) -> 2 axis=1
main/Loop.body/If.then_branch/If.else_branch  Identity(^Exp:0) -> 1
main/Loop.body/If.then_branch/If.else_branch gives Identity:0
main/Loop.body/If.then_branch/If.then_branch  And(Or:0, GreaterOrEqual:0) -> 1
main/Loop.body/If.then_branch/If.then_branch  CumSum(^Exp:0, ^one) -> 1 exclusive=1
main/Loop.body/If.then_branch/If.then_branch  GreaterOrEqual(^Exp:0, ^min_p) -> 1
main/Loop.body/If.then_branch/If.then_branch  Less(CumSum:0, Mul:0) -> 1
main/Loop.body/If.then_branch/If.then_branch  Mul(ReduceSum:0, ^top_p) -> 1
main/Loop.body/If.then_branch/If.then_branch  Or(Less:0, ^GreaterOrEqual:0) -> 1
main/Loop.body/If.then_branch/If.then_branch  ReduceSum(^Exp:0, ^axis_1) -> 1 keepdims=1
main/Loop.body/If.then_branch/If.then_branch  Where(And:0, ^Exp:0, ^zero_f64) -> 1
main/Loop.body/If.then_branch/If.then_branch gives Where:0
main/Scan.body  Add(layer#_gates, MatMulIntegerToFloat:0) -> 1
main/Scan.body  Split(MatMulIntegerToFloat:0, ^switches_candidate) -> 2 axis=1
main/Scan.body com.microsoft MatMulIntegerToFloat(QuantizeLinear:0, ^recurrent# i8, ^state_scale, ^recurrent#_scale f32, ^state_middle, -, ^recurrent#_bias f32) -> 1
""".strip().splitlines()
)
# Domain and name.
OPERATORS = frozenset(" ".join(form.split("(")[0].split(" ")[1:3]) for form in FORMS | EARLIER if "(" in form)
