// What tests/test_javascript.py asks of a runtime. Usage: node run.mjs RUNTIME JOBS, where RUNTIME is the path of
// onnxruntime's module, and JOBS a JSON file: [{ model, ids, uniforms, options }], with uniforms and options per row.
// Prints what each gave, as JSON.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { generate, metadata, run, zeroState } from "./client.mjs";

const [runtime, jobs] = process.argv.slice(2);
const ort = createRequire(import.meta.url)(runtime);
if (ort.env.wasm) ort.env.wasm.numThreads = 1;

const results = [];
for (const { model, ids, uniforms, options } of JSON.parse(readFileSync(jobs))) {
  const bytes = new Uint8Array(readFileSync(model));
  const session = await ort.InferenceSession.create(bytes);
  const { logits } = await run(ort, session, [ids], zeroState(ort, session));
  const remaining = uniforms[0].values();
  const generated = [];
  for await (const id of generate(ort, session, ids, uniforms[0].length, options[0], () => remaining.next().value))
    generated.push(id);

  const state = zeroState(ort, session, uniforms.length);
  const rows = await run(ort, session, uniforms.map(() => ids), state, uniforms, options);
  results.push({
    metadata: metadata(bytes),
    logits: Array.from(logits.data.slice(-logits.dims[2])),
    generated,
    rows: Array.from(rows.drawn.data, Number),
    h_next: Array.from(rows.h_next.data),
  });
}
console.log(JSON.stringify(results));
