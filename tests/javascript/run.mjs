// What tests/test_javascript.py asks of a runtime. Usage: node run.mjs RUNTIME JOBS, where RUNTIME is the path of
// onnxruntime's module, and JOBS a JSON file: [{ model, ids, uniforms, options }]. Prints what each gave, as JSON.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { generate, metadata, step, withRequiredInputs, zeroState } from "./client.mjs";

const [runtime, jobs] = process.argv.slice(2);
const ort = createRequire(import.meta.url)(runtime);
if (ort.env.wasm) ort.env.wasm.numThreads = 1;

const open = (bytes) => ort.InferenceSession.create(bytes, { logSeverityLevel: 3 });
const results = [];
for (const { model, ids, uniforms, options } of JSON.parse(readFileSync(jobs))) {
  const bytes = new Uint8Array(readFileSync(model));
  const session = await open(bytes);
  const [logits] = await step(ort, session, ids, zeroState(ort, session));
  const remaining = uniforms.values();
  const stepped = [];
  for await (const id of generate(ort, session, ids, uniforms.length, options, () => remaining.next().value))
    stepped.push(id);

  const loop = await open(withRequiredInputs(bytes));
  const { h_next, drawn } = await loop.run({
    ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    ...zeroState(ort, session),
    uniforms: new ort.Tensor("float64", uniforms, [1, uniforms.length]),
    temperature: new ort.Tensor("float64", [options.temperature], []),
    top_k: new ort.Tensor("int64", [BigInt(options.top_k)], []),
    top_p: new ort.Tensor("float64", [options.top_p], []),
    min_p: new ort.Tensor("float64", [options.min_p], []),
  });
  results.push({
    inputs: session.inputNames,
    metadata: metadata(bytes),
    logits: Array.from(logits),
    stepped,
    looped: Array.from(drawn.data, Number),
    h_next: Array.from(h_next.data),
  });
}
console.log(JSON.stringify(results));
