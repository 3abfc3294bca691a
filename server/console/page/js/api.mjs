/** Talks to the server: the key of this tab, errors in one shape, uploads with progress, streams of events. */

import { connection } from "./connection.mjs";

const KEY = "perft-key";
const ROOT = new URL("./", document.baseURI);

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The URL of a path of the server, also behind a prefix. */
export function urlOf(path) {
  return new URL(path.replace(/^\//, ""), ROOT).href;
}

/** What the server answered instead of what was asked for. status 0: it did not answer. */
export class ApiError extends Error {
  constructor(status, { message, code = null, param = null, violations = null }, requestId = null) {
    super(message);
    Object.assign(this, { status, code, param, violations, requestId });
  }
}

function headers(more = {}, presented = key.get()) {
  return presented ? { ...more, Authorization: `Bearer ${presented}` } : more;
}

/** presented: another key than the tab's. */
async function request(method, path, { body, signal, presented } = {}) {
  const type = body === undefined ? {} : { "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(urlOf(path), {
      method, signal, headers: headers(type, presented), body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "omit", cache: "no-store", redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connection.lost();
    throw new ApiError(0, { message: "the server does not answer" });
  }
  if (response.ok) {
    connection.answered();
    return response;
  }
  throw failure(response.status, await response.text(), response.headers.get("x-request-id"));
}

function failure(status, text, requestId) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // a proxy's page
  }
  error.message ??= `the server answered ${status}`;
  const found = new ApiError(status, error, requestId);
  if (error.code === "engine_unavailable" || status === 502 || status === 504) connection.unavailable(error.message);
  else connection.answered();
  return found;
}

/** The JSON at a path. Raises ApiError. */
export async function getJson(path, options = {}) {
  return await (await request("GET", path, options)).json();
}

/** The text at a path. Raises ApiError. */
export async function getText(path, options = {}) {
  return await (await request("GET", path, options)).text();
}

/** The bytes at a path, as a Blob. Raises ApiError. */
export async function getBlob(path, options = {}) {
  const response = await request("GET", path, options);
  try {
    return await response.blob();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "the connection broke off" });
  }
}

/** Send JSON (or nothing) and return the JSON of the answer. Raises ApiError. */
export async function sendJson(method, path, body, options = {}) {
  return await (await request(method, path, { body, ...options })).json();
}

/** Upload a form; progress(sent, total) in bytes. Returns {promise, cancel}; the promise is of {created, adapter, location}
 * (location: the path of the version), or rejects with ApiError. */
export function upload(path, form, progress) {
  const call = new XMLHttpRequest();
  const promise = new Promise((resolve, reject) => {
    call.open("POST", urlOf(path));
    for (const [name, value] of Object.entries(headers())) call.setRequestHeader(name, value);
    call.upload.onprogress = (event) => progress(event.loaded, event.total);
    call.onload = () => {
      if (call.status >= 200 && call.status < 300) {
        connection.answered();
        resolve({
          created: call.status === 201, adapter: JSON.parse(call.responseText), location: call.getResponseHeader("location") ?? "",
        });
      } else reject(failure(call.status, call.responseText, call.getResponseHeader("x-request-id")));
    };
    call.onerror = () => reject(new ApiError(0, { message: "the connection ended before the server answered" }));
    call.onabort = () => reject(new ApiError(0, { message: "cancelled", code: "cancelled" }));
  });
  call.send(form);
  return { promise, cancel: () => call.abort() };
}

/** The events of a stream, each the JSON after `data:`, until [DONE]. Raises ApiError, also for an error within. */
export async function* stream(path, body, signal) {
  const response = await request("POST", path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, { message: "the stream ended before it was complete" });
      buffer += value;
      const lines = buffer.split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(response.status, event.error);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    connection.lost();
    throw new ApiError(0, { message: "the connection broke off" });
  } finally {
    reader.cancel().catch(() => {});
  }
}
