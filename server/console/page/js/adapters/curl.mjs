/** Writes the curl command for what a button does. It never has a key in it. No DOM. */

const KEY = '"Authorization: Bearer $PERFT_ADMIN_KEY"';

function quoted(text) {
  return /^[A-Za-z0-9_@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** url: absolute. body: sent as JSON. form: [[name, value]] of a multipart form; a value with a leading @ is a file.
 * file: true saves the answer under the server's name. */
export function curlOf({ method = "GET", url, body, form, file = false }) {
  const lines = [`curl${method === "GET" || form ? "" : ` -X ${method}`}${file ? " --fail -OJ" : ""} ${quoted(url)} -H ${KEY}`];
  if (body !== undefined) {
    lines.push(`-H 'Content-Type: application/json' -d ${quoted(JSON.stringify(body))}`);
  }
  for (const [name, value] of form ?? []) lines.push(`-F ${quoted(`${name}=${value}`)}`);
  return lines.join(" \\\n  ");
}
