/** Knows whether the server answers: "ok", "unavailable" (it says why) or "lost" (it does not answer). */

class Connection extends EventTarget {
  state = "ok";
  message = "";

  answered() {
    this.#become("ok", "");
  }

  unavailable(message) {
    this.#become("unavailable", message);
  }

  lost() {
    this.#become("lost", "The server does not answer.");
  }

  #become(state, message) {
    if (state === this.state && message === this.message) return;
    const was = this.state;
    Object.assign(this, { state, message });
    this.dispatchEvent(new Event("change"));
    if (state === "ok" && was !== "ok") this.dispatchEvent(new Event("back"));
  }
}

export const connection = new Connection();
