// What a page of another origin tries on the console's server. attack(SERVER, ADAPTER) resolves to {name: outcome}; an
// outcome that does not begin with "refused" is a hole.

async function attack(server, adapter) {
  const outcomes = {};
  const within = (promise) => Promise.race([promise, new Promise((resolve) => setTimeout(() => resolve("refused: nothing came"), 4000))]);
  const attempt = async (name, work) => {
    try {
      outcomes[name] = await within(work());
    } catch (error) {
      outcomes[name] = `refused: ${error.name}`;
    }
  };
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const form = () => {
    const made = new FormData();
    made.append("name", "intruder");
    made.append("config", new File([bytes(adapter.config)], "adapter_config.json"));
    made.append("weights", new File([bytes(adapter.weights)], "adapter_model.safetensors"));
    return made;
  };
  const chat = JSON.stringify({ model: adapter.known, messages: [{ role: "user", content: "t7" }], max_tokens: 1 });
  const read = async (response) => (response.type === "opaque" ? "refused: opaque" : `read ${response.status}`);
  const urls = ["/", "/console/session", "/console/metrics", "/metrics", "/v1/adapters", "/v1/models", "/openapi.json"];

  for (const mode of ["cors", "no-cors"]) {
    for (const url of urls) await attempt(`${mode} GET ${url}`, async () => read(await fetch(server + url, { mode })));
    await attempt(`${mode} upload`, async () => read(await fetch(`${server}/v1/adapters`, { method: "POST", mode, body: form() })));
    await attempt(`${mode} chat`, async () => read(await fetch(`${server}/v1/chat/completions`, { method: "POST", mode, body: chat })));
    await attempt(`${mode} with credentials`, async () => read(await fetch(`${server}/v1/adapters`, { mode, credentials: "include" })));
  }
  for (const method of ["PATCH", "DELETE", "PUT"]) {
    await attempt(`cors ${method}`, async () => read(await fetch(`${server}/v1/adapters/${adapter.known}`, { method, body: method === "PATCH" ? '{"active": null}' : undefined })));
  }
  await attempt("cors with a key", async () => read(await fetch(`${server}/v1/adapters`, { headers: { Authorization: "Bearer x" } })));
  await attempt("request of old", () => new Promise((resolve) => {
    const call = new XMLHttpRequest();
    call.onload = () => resolve(`read ${call.status}`);
    call.onerror = () => resolve("refused: error");
    call.open("GET", `${server}/v1/adapters`);
    call.send();
  }));
  await attempt("beacon", async () => (navigator.sendBeacon(`${server}/v1/adapters`, form()) ? "refused: unread" : "refused: not sent"));
  await attempt("events", () => new Promise((resolve) => {
    const source = new EventSource(`${server}/console/metrics`);
    source.onmessage = () => resolve("read");
    source.onerror = () => (source.close(), resolve("refused: error"));
  }));
  await attempt("socket", () => new Promise((resolve) => {
    const socket = new WebSocket(`${server.replace("http", "ws")}/v1/adapters`);
    socket.onopen = () => resolve("open");
    socket.onerror = () => resolve("refused: error");
  }));

  for (const enctype of ["multipart/form-data", "text/plain", "application/x-www-form-urlencoded"]) {
    for (const path of ["/v1/adapters", `/v1/adapters/${adapter.known}`, "/v1/chat/completions"]) {
      await attempt(`form ${enctype} ${path}`, () => submit(server + path, enctype, form(), chat));
    }
  }
  await attempt("form GET", () => submit(`${server}/v1/adapters`, null, form(), chat));

  await attempt("frame", () => new Promise((resolve) => {
    const frame = document.createElement("iframe");
    frame.src = `${server}/`;
    frame.onload = () => {
      let inside = null;
      try {
        inside = frame.contentDocument?.getElementById("main") ?? frame.contentWindow.document.title;
      } catch {
        inside = null;
      }
      resolve(inside === null && frame.contentWindow.length === 0 ? "refused: not readable" : `read ${inside}`);
    };
    document.body.append(frame);
  }));
  await attempt("window", async () => {
    const opened = window.open(`${server}/#/adapters/${adapter.known}`);
    await new Promise((resolve) => setTimeout(resolve, 1500));
    try {
      opened.location = "javascript:owned('window')";
    } catch {
      // severed
    }
    try {
      return `read ${opened.document.title} ${opened.sessionStorage.length}`;
    } catch (error) {
      return `refused: ${error.name}`;
    }
  });
  const loads = (tag, properties) => () => new Promise((resolve) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.onload = () => resolve("loaded");
    element.onerror = () => resolve("refused: error");
    document.head.append(element);
  });
  await attempt("script", loads("script", { src: `${server}/console/js/api.mjs` }));
  await attempt("module", loads("script", { type: "module", src: `${server}/console/js/main.mjs` }));
  await attempt("style", loads("link", { rel: "stylesheet", href: `${server}/console/style/base.css` }));
  await attempt("image", loads("img", { src: `${server}/console/icon.svg` }));
  await attempt("import", async () => `read ${Object.keys(await import(`${server}/console/js/api.mjs`))}`);
  return outcomes;
}

async function submit(action, enctype, data, chat) {
  const frame = document.createElement("iframe");
  frame.name = `frame-${Math.random()}`;
  document.body.append(frame);
  const form = document.createElement("form");
  Object.assign(form, { action, target: frame.name, method: enctype === null ? "get" : "post" });
  if (enctype !== null) form.enctype = enctype;
  for (const [name, value] of enctype === "text/plain" ? [[`${chat.slice(0, -1)}, "x": "`, '"}']] : data) {
    const input = document.createElement("input");
    input.name = name;
    if (value instanceof File && enctype === "multipart/form-data") {
      input.type = "file";
      const transfer = new DataTransfer();
      transfer.items.add(value);
      input.files = transfer.files;
    } else input.value = value instanceof File ? "x" : value;
    form.append(input);
  }
  document.body.append(form);
  const loaded = new Promise((resolve) => {
    frame.onload = resolve;
  });
  form.submit();
  await loaded;
  let inside = null;
  try {
    inside = frame.contentDocument?.body?.textContent ?? null;
  } catch {
    inside = null;
  }
  return inside === null ? "refused: not readable" : `read ${inside}`;
}
