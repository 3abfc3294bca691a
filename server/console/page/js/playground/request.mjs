/** Makes the body of a request from what the reader chose, and reads the events of its stream. */

export const CHAT = "chat";
export const TEXT = "text";

export const PATHS = { [CHAT]: "/v1/chat/completions", [TEXT]: "/v1/completions" };

/** What a reader may choose beside the prompt; all are texts, "" leaves one out. */
export const NO_SETTINGS = Object.freeze({ system: "", temperature: "", top_p: "", max_tokens: "", seed: "", stop: "" });
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** The stop texts: one a line, `\n` and `\t` in it stand for a line break and a tab, `\\` for a backslash. */
export function stopsOf(text) {
  const signs = { n: "\n", t: "\t", "\\": "\\" };
  return text.split("\n").filter((line) => line !== "").map((line) => line.replace(/\\([nt\\])/g, (_, sign) => signs[sign]));
}

/** The body. before: the turns that the model is to remember, each {prompt, text}. */
export function bodyOf(mode, model, before, prompt, settings) {
  const body = { model };
  if (mode === CHAT) body.messages = messagesOf(before, prompt, settings.system);
  else body.prompt = before.map((turn) => turn.prompt + turn.text).join("") + prompt;
  for (const name of NUMBERS) {
    if (settings[name] !== "" && Number.isFinite(Number(settings[name]))) body[name] = Number(settings[name]);
  }
  const stops = stopsOf(settings.stop);
  if (stops.length) body.stop = stops;
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

function messagesOf(before, prompt, system) {
  const messages = system.trim() === "" ? [] : [{ role: "system", content: system }];
  for (const turn of before) messages.push({ role: "user", content: turn.prompt }, { role: "assistant", content: turn.text });
  return [...messages, { role: "user", content: prompt }];
}

/** What one event of a stream says: {text, thought, reason, usage, model}, null where it says nothing of it. */
export function read(event) {
  const choice = event.choices?.[0];
  return {
    text: choice?.delta?.content ?? choice?.text ?? "",
    thought: choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "",
    reason: choice?.finish_reason ?? null,
    usage: event.usage ?? null,
    model: event.model ?? null,
  };
}

/** Whether an error says that the base has no chat template. */
export function lacksTemplate(error) {
  return error?.status === 400 && /chat[ _]template/i.test(error.message) && !/kwargs/i.test(`${error.param} ${error.message}`);
}
