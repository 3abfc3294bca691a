/** Writes a request as it is made elsewhere: with curl in a shell, with the openai client in Python. The key is read from
 * the environment, never written out. */

export const KEY_VARIABLE = "PERFT_API_KEY";

/** What JSON.stringify leaves as it is although a terminal or an editor would not show it, or would turn the line around. */
const UNPRINTABLE = /[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|\udb40[\udc00-\udc7f]/g;
const SIMPLE = /^[A-Za-z0-9_@%+=:,./-]+$/;

function escaped(json) {
  const escape = (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return json.replace(UNPRINTABLE, (character) => character.split("").map(escape).join(""));
}

/** A text as one word of a POSIX shell. */
export function shellWord(text) {
  return SIMPLE.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** The request as a command. url: of the route; body: what was sent; needsKey: whether a key goes along. */
export function curlOf(url, body, needsKey) {
  const lines = [`curl -N ${shellWord(url)}`, "-H 'Content-Type: application/json'"];
  if (needsKey) lines.push(`-H "Authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push(`-d ${shellWord(escaped(JSON.stringify(body, null, 1)))}`);
  return lines.join(" \\\n  ");
}

/** A JSON value as Python writes it. */
export function pythonOf(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return escaped(JSON.stringify(value));
  const deeper = `${indent}    `;
  if (Array.isArray(value)) {
    return value.length ? `[\n${value.map((item) => `${deeper}${pythonOf(item, deeper)},\n`).join("")}${indent}]` : "[]";
  }
  const items = Object.entries(value).map(([name, item]) => `${escaped(JSON.stringify(name))}: ${pythonOf(item, deeper)}`);
  return `{${items.join(", ")}}`;
}

/** The request as a program. base: the URL that the client's paths begin at (.../v1); isChat: by which route. */
export function openaiOf(base, body, needsKey, isChat) {
  const { stream: _, stream_options: __, ...rest } = body;
  const given = Object.entries(rest).map(([name, value]) => `    ${name}=${pythonOf(value, "    ")},\n`);
  const key = needsKey ? `os.environ["${KEY_VARIABLE}"]` : `"unused"`;
  const piece = isChat ? "chunk.choices[0].delta.content" : "chunk.choices[0].text";
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${escaped(JSON.stringify(base))}, api_key=${key})`,
    `stream = client.${isChat ? "chat.completions" : "completions"}.create(`,
    `${given.join("")}    stream=True,`,
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    `        print(${piece} or "", end="", flush=True)`,
    "print()",
    "",
  ].join("\n");
}
