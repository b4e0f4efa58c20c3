// Writes text with a charrnn model file in JavaScript; onnxruntime-node and onnxruntime-web run it alike.
//
//   const session = await ort.InferenceSession.create(bytes);
//   const file = metadata(bytes), symbols = JSON.parse(file["charrnn.vocab"]).symbols;
//   const prompt = [..."ROMEO:"].map((character) => symbols.indexOf(character));
//   for await (const id of generate(ort, session, prompt, 200, { temperature: 0.8 })) write(symbols[id]);
//
// Letters: T characters read, N characters drawn, L num_layers, H hidden_dim, V vocabulary size.

// One id out of scores. logits: (V,). uniform: in [0, 1). The rules, and their order, are those of charrnn/sampling.py.
export function draw(logits, uniform, { temperature = 1, top_k = 0, top_p = 1, min_p = 0 } = {}) {
  const peak = logits.reduce((a, b) => Math.max(a, b));
  if (temperature === 0) return logits.indexOf(peak);
  const shares = Array.from(logits, (x) => Math.exp((x - peak) / temperature)); // (V,), the likeliest has 1
  const sum = (ids) => ids.reduce((total, id) => total + shares[id], 0);
  const ranked = [...shares.keys()].sort((a, b) => logits[b] - logits[a] || a - b).slice(0, top_k || logits.length);
  const limit = top_p * sum(ranked);
  const kept = new Set();
  let mass = 0;
  for (const id of ranked) {
    if (top_p < 1 && mass >= limit) break;
    mass += shares[id];
    if (shares[id] >= min_p) kept.add(id);
  }
  const ids = [...shares.keys()].filter((id) => kept.has(id));
  const target = uniform * sum(ids);
  let end = 0;
  return ids.find((id) => (end += shares[id]) > target);
}

// Reads characters. ids: (T,). state: { h } or { h, c }, each (L, 1, H). Returns the logits after the last, (V,), and
// the state there.
export async function step(ort, session, ids, state) {
  const feeds = { ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]), ...state };
  const outputs = await session.run(feeds);
  const [, , V] = outputs.logits.dims; // (1, T, V)
  const after = Object.fromEntries(Object.keys(state).map((name) => [name, outputs[`${name}_next`]]));
  return [outputs.logits.data.slice(-V), after];
}

// The state before the first character: { h } or { h, c }.
export function zeroState(ort, session) {
  const states = session.inputMetadata.filter(({ name }) => name === "h" || name === "c");
  return Object.fromEntries(
    states.map(({ name, shape: [L, , H] }) => [name, new ort.Tensor("float32", new Float32Array(L * H), [L, 1, H])]),
  );
}

// Yields `length` ids after a prompt of ids (at least one). random: gives uniforms in [0, 1).
export async function* generate(ort, session, prompt, length, options = {}, random = Math.random) {
  let [logits, state] = await step(ort, session, prompt, zeroState(ort, session));
  for (let i = 0; i < length; i++) {
    const id = draw(logits, random(), options);
    yield id;
    if (i + 1 < length) [logits, state] = await step(ort, session, [id], state);
  }
}

// A model file's metadata, which onnxruntime does not show in JavaScript: { "charrnn.vocab": "{...}", ... }.
export function metadata(bytes) {
  const text = new TextDecoder();
  const pairs = fields(bytes).filter(({ number }) => number === METADATA);
  return Object.fromEntries(pairs.map(({ body }) => fields(body).map((field) => text.decode(field.body))));
}

// The file with its five optional inputs made required. In JavaScript onnxruntime offers no optional inputs, so that
// this is the way to the graph's own loop: N characters in one run. bytes: a model file's. Returns the new file's.
export function withRequiredInputs(bytes) {
  const optional = ["uniforms", "temperature", "top_k", "top_p", "min_p"];
  const name = (tensor) => new TextDecoder().decode(fields(tensor).find(({ number }) => number === TENSOR_NAME)?.body);
  const isDefault = ({ number, body }) => number === INITIALIZER && optional.includes(name(body));
  const parts = fields(bytes).map(({ number, body, whole }) => {
    if (number !== GRAPH) return [whole];
    const kept = fields(body).filter((field) => !isDefault(field)).map((field) => field.whole);
    return [varint(GRAPH * 8 + 2), varint(kept.reduce((size, part) => size + part.length, 0)), ...kept];
  });
  return new Uint8Array(Buffer.concat(parts.flat()));
}

// Field numbers of onnx.proto: of ModelProto two, of GraphProto, of TensorProto.
const [GRAPH, METADATA, INITIALIZER, TENSOR_NAME] = [7, 14, 5, 8];

// A protobuf message taken apart: of each field its number, its content, and both with what frames them.
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
    const start = at;
    const tag = read();
    const size = { 0: () => (read(), 0), 1: () => 8, 2: read, 5: () => 4 }[tag & 7]();
    at += size;
    found.push({ number: tag >> 3, body: bytes.subarray(at - size, at), whole: bytes.subarray(start, at) });
  }
  return found;
}

function varint(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value & 127) | 128);
  return Uint8Array.of(...bytes, value);
}
