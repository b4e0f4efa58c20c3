// Writes text with a charrnn model file in JavaScript; onnxruntime-node and onnxruntime-web run it alike.
//
//   const session = await ort.InferenceSession.create(bytes);
//   const file = metadata(bytes), symbols = JSON.parse(file["charrnn.vocab"]).symbols;
//   const prompt = [..."ROMEO:"].map((character) => symbols.indexOf(character));
//   for await (const id of generate(ort, session, prompt, 200, { temperature: 0.8 })) write(symbols[id]);
//
// A seed, a penalty or rules of another kind are the caller's: `run` without uniforms gives the logits.
// Letters: R rows, T characters read, N characters generated, L num_layers, H hidden_dim, V vocabulary size.

// Runs the file. ids: of R rows of T characters, (R, T). state: { h } or { h, c }, each (L, R, H). uniforms: (R, N)
// numbers in [0, 1), with which it generates N characters per row after the ids; without them it reads only. options:
// how row r is sampled, options[r]. Returns { logits, h_next, c_next, drawn }.
export function run(ort, session, ids, state, uniforms = ids.map(() => []), options = ids.map(() => ({}))) {
  const [R, T, N] = [ids.length, ids[0].length, uniforms[0].length];
  const row = (name, whole, least) => options.map((one) => whole(one.temperature === 0 && name === "top_k" ? 1 : one[name] || least));
  return session.run({
    ids: new ort.Tensor("int64", BigInt64Array.from(ids.flat(), BigInt), [R, T]),
    ...state,
    uniforms: new ort.Tensor("float64", Float64Array.from(uniforms.flat()), [R, N]),
    temperature: new ort.Tensor("float64", Float64Array.from(row("temperature", Number, 1)), [R]),
    top_k: new ort.Tensor("int64", BigInt64Array.from(row("top_k", BigInt, 0)), [R]),
    top_p: new ort.Tensor("float64", Float64Array.from(row("top_p", Number, 1)), [R]),
    min_p: new ort.Tensor("float64", Float64Array.from(row("min_p", Number, 0)), [R]),
  });
}

// The state before the first character of R rows: { h } or { h, c }.
export function zeroState(ort, session, R = 1) {
  const states = session.inputMetadata.filter(({ name }) => name === "h" || name === "c");
  return Object.fromEntries(
    states.map(({ name, shape: [L, , H] }) => [name, new ort.Tensor("float32", new Float32Array(L * R * H), [L, R, H])]),
  );
}

// Yields `length` ids after a prompt of ids (at least one). random: gives uniforms in [0, 1).
export async function* generate(ort, session, prompt, length, options = {}, random = Math.random) {
  let [ids, state] = [prompt, zeroState(ort, session)];
  for (let left = length; left > 0; left -= 32) {
    const uniforms = Array.from({ length: Math.min(left, 32) }, random);
    const outputs = await run(ort, session, [ids], state, [uniforms], [options]);
    const drawn = Array.from(outputs.drawn.data, Number); // (N,)
    yield* drawn;
    ids = drawn.slice(-1);
    state = Object.fromEntries(Object.keys(state).map((name) => [name, outputs[`${name}_next`]]));
  }
}

// A model file's metadata, which onnxruntime does not show in JavaScript: { "charrnn.vocab": "{...}", ... }.
export function metadata(bytes) {
  const text = new TextDecoder();
  const pairs = fields(bytes).filter(({ number }) => number === METADATA);
  return Object.fromEntries(pairs.map(({ body }) => fields(body).map((field) => text.decode(field.body))));
}

// onnx.proto's field number of ModelProto.metadata_props.
const METADATA = 14;

// A protobuf message taken apart: each field's number and content.
function fields(bytes) {
  const found = [];
  let at = 0;
  const read = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (!(byte & 128)) return value;
    }
  };
  while (at < bytes.length) {
    const tag = read();
    const size = { 0: () => (read(), 0), 1: () => 8, 2: read, 5: () => 4 }[tag & 7]();
    at += size;
    found.push({ number: tag >> 3, body: bytes.subarray(at - size, at) });
  }
  return found;
}
