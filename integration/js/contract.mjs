// The server's contract, checked with the openai JavaScript client; ../python_contract.py is the same in Python.
//
//   BASE_URL=http://127.0.0.1:8000/v1 API_KEY=... ADMIN_KEY=... ADAPTER=pirate BASE=demo-base node contract.mjs
//
// Prints one line per check and exits with 1 at the first failure.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import OpenAI from "openai";

const { BASE_URL, API_KEY, ADMIN_KEY, ADAPTER, BASE, MAX_ADAPTER_BYTES, REQUESTS_AT_ONCE } = process.env;
const KEYS = { api: API_KEY, admin: ADMIN_KEY, wrong: "a-key-of-nobody" };
const CLIENTS = Object.fromEntries(
  Object.entries(KEYS).map(([name, apiKey]) => [
    name,
    new OpenAI({ baseURL: BASE_URL, apiKey, maxRetries: 0, timeout: 500_000 }),
  ]),
);
const QUESTION = {
  messages: [{ role: "user", content: "What is the capital of France?" }],
  temperature: 0,
  max_tokens: 24,
};

const chat = (model, options = {}) => CLIENTS.api.chat.completions.create({ model, ...QUESTION, ...options });

async function collect(iterable) {
  const items = [];
  for await (const item of iterable) items.push(item);
  return items;
}

async function refused(name, request, status, code) {
  let answer;
  try {
    answer = await request();
  } catch (error) {
    assert.ok(error instanceof OpenAI.APIError, `${name}: ${error}`);
    assert.equal(error.status, status, `${name}: ${error.message}`);
    for (const key of ["message", "type", "param", "code"]) assert.ok(key in error.error, `${name}: no ${key}`);
    assert.ok(error.error.message, name);
    if (code) assert.equal(error.code, code, name);
    return error;
  }
  assert.fail(`${name}: it was answered: ${JSON.stringify(answer)}`);
}

async function modelsAreListed() {
  const listed = Object.fromEntries((await collect(CLIENTS.api.models.list())).map((model) => [model.id, model]));
  assert.equal(listed[ADAPTER].parent, BASE);
  assert.equal(listed[BASE].parent, null);
  assert.ok(Object.values(listed).every((model) => !model.root.includes("/")));
  assert.equal((await CLIENTS.api.models.retrieve(ADAPTER)).id, ADAPTER);
}

async function anAdapterAndTheBaseAnswer() {
  const [adapter, base] = [await chat(ADAPTER), await chat(BASE)];
  assert.equal(adapter.model, `${ADAPTER}@1`);
  assert.equal(base.model, BASE);
  assert.notEqual(adapter.choices[0].message.content, base.choices[0].message.content);
  assert.ok(adapter.usage.completion_tokens > 0);
}

async function aPinnedVersionAnswersAsTheActiveOne() {
  const [pinned, active] = [await chat(`${ADAPTER}@1`), await chat(ADAPTER)];
  assert.equal(pinned.model, `${ADAPTER}@1`);
  assert.equal(pinned.choices[0].message.content, active.choices[0].message.content);
}

async function aStreamSaysTheSameWithUsage() {
  const whole = await chat(ADAPTER);
  const chunks = await collect(await chat(ADAPTER, { stream: true, stream_options: { include_usage: true } }));
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(new Set(chunks.map((chunk) => chunk.model)), new Set([`${ADAPTER}@1`]));
  for (const count of ["prompt_tokens", "completion_tokens", "total_tokens"]) {
    assert.equal(chunks.at(-1).usage[count], whole.usage[count]);
  }
}

async function everyListedErrorIsAsItSays() {
  const listed = await readFile(new URL("../errors.json", import.meta.url), "utf8");
  for (const { name, key, method, path, body, status, code } of JSON.parse(listed.replaceAll("$ADAPTER", ADAPTER))) {
    await refused(name, () => CLIENTS[key][method](path, body ? { body } : {}), status, code);
  }
}

function upload(name, weights) {
  const body = new FormData();
  body.set("name", name);
  body.set("config", new Blob(["{}"]), "adapter_config.json");
  body.set("weights", new Blob([weights]), "adapter_model.safetensors");
  return CLIENTS.admin.post("/adapters", { body });
}

async function aBadUploadIsRefused() {
  const broken = await refused("broken", () => upload("integration-broken", "no safetensors"), 400, "invalid_adapter");
  assert.ok(broken.error.violations.length > 0);
  await refused("bad name", () => upload("Not A Name", "no safetensors"), 400, "invalid_name");
  const large = new Uint8Array(Number(MAX_ADAPTER_BYTES) + 1);
  await refused("large", () => upload("integration-large", large), 413, "adapter_too_large");
}

async function moreRequestsAtOnceThanTheKeyHasAreRefused() {
  const streams = [];
  try {
    for (let number = 0; number < Number(REQUESTS_AT_ONCE); number++) {
      const stream = await chat(BASE, { stream: true, max_tokens: 1900, ignore_eos: true });
      streams.push(stream);
    }
    const error = await refused("too many at once", () => chat(BASE), 429, "rate_limited");
    assert.ok(Number(error.headers.get("retry-after")) >= 1);
  } finally {
    for (const stream of streams) stream.controller.abort();
  }
}

const CHECKS = [
  modelsAreListed,
  anAdapterAndTheBaseAnswer,
  aPinnedVersionAnswersAsTheActiveOne,
  aStreamSaysTheSameWithUsage,
  everyListedErrorIsAsItSays,
  aBadUploadIsRefused,
  moreRequestsAtOnceThanTheKeyHasAreRefused,
];

for (const check of CHECKS) {
  await check();
  console.log(`ok ${check.name}`);
}
